"""Films decode to the right pixels, and batches are a function of seed and number alone, on any number of hosts."""

import io
import json
import resource
import signal
import threading
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import tensorflow_datasets as tf_datasets
from hosts import host_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets, mixture, records, tfds, video
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.mixture import Batches

SIZE = video.Size(32, 48)
WAY = av.video.reformatter.Interpolation
# FFmpeg's own conversion without its shortcuts: the witness for ours.
EXACT = WAY.BILINEAR | WAY.ACCURATE_RND | WAY.FULL_CHR_H_INT


def numbered(frames=24, colour=0):
  """A film on which every frame shows its own number, 5 grey levels a frame, over a strip of the film's own colour."""
  film = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 5 + 20, 32, 1).repeat(48, 2).repeat(3, 3)
  film[:, :8] = 10 * colour
  return film


def colours(films):
  return np.rint(films[:, :, 2:6].mean((1, 2, 3, 4)) / 10).astype(int).tolist()


def number_on(frames):
  return np.rint((frames[:, 12:, :, 1].mean((1, 2)) - 20) / 5).astype(int)


def clip_of(name, frames=24, fps=24., colour=0):
  character = np.zeros((frames, 32, 48), bool)
  character[np.arange(frames), 10:20, np.arange(frames)] = True
  return records.Clip(id=f"{name}/0", film=name, source="here", licence="CC0-1.0", caption=f"clip {name}", fps=fps,
                      frames=frames, height=32, width=48, motion=None, character=records.pack_mask(character),
                      mp4=video.encode(numbered(frames, colour), fps))


def write_folder(folder, train, held_out=(), seconds=1., write=records.write_shard):
  folder.mkdir(parents=True)
  splits = {}
  for split, clips in (("train", train), ("held_out", held_out)):
    half = [clips[:len(clips) // 2], clips[len(clips) // 2:]]
    shards = [write(folder / f"{split}-0000{n}-of-00002.arrayrecord", [
      clip if isinstance(clip, bytes) else records.to_bytes(clip) for clip in part]) for n, part in enumerate(half)]
    splits[split] = {"shards": shards}
  (folder / "index.json").write_text(json.dumps({"clip_seconds": seconds, "splits": splits}))
  return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two folders of records: 10 train and 5 held-out clips, and 4 train and 1 held-out."""
  root = tmp_path_factory.mktemp("records")
  return [write_folder(root / name, [clip_of(f"{name}-{n}", colour=n) for n in range(train)],
                       [clip_of(f"{name}-held-{n}") for n in range(held)])
          for name, train, held in (("one", 10, 5), ("two", 4, 1))]


def draw(batches, count):
  return [next(batches) for _ in range(count)]


def same(one, other):
  return all((np.array_equal(one[k], other[k])) for k in ("frames", "character", "id", "ok")) and (
    one["caption"] == other["caption"])


# films

@pytest.mark.parametrize(("space", "number"), [("ITU601", 6), ("ITU709", 1)])
@pytest.mark.parametrize("full", [False, True])
def test_decoded_pixels_are_those_of_ffmpegs_own_conversion(space, number, full):
  picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8), (0, 0), 4)
  picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
  out = io.BytesIO()
  with av.open(out, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
    stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
    stream.codec_context.colorspace, stream.codec_context.color_range = number, 2 if full else 1
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
      format="yuv420p", dst_colorspace=space, dst_color_range="JPEG" if full else "MPEG")
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  ours = video.frames(out.getvalue(), [0])[0].astype(int)
  with av.open(io.BytesIO(out.getvalue())) as container:
    theirs = next(container.decode(video=0)).reformat(
      format="rgb24", dst_color_range="JPEG", interpolation=EXACT)
  difference = ours - theirs.to_ndarray()
  # Both interpolate the halved colour planes, and round; a wrong matrix, range or place of the colour is off by more.
  assert abs(difference).mean() < .5 and abs(difference).max() <= 4
  assert abs(ours - picture).mean() < 2.5


def test_encoded_colours_come_back_from_ffmpeg_where_they_were():
  picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8), (0, 0), 4)
  picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
  with av.open(io.BytesIO(video.encode(picture[None], 24., crf=1))) as container:
    back = next(container.decode(video=0)).reformat(format="rgb24", interpolation=EXACT).to_ndarray()
  error = back.astype(int) - picture
  assert abs(error.mean((0, 1))).max() < .3
  # Colour a column away from its place would add the mean step between columns, 5 levels.
  assert abs(error).mean() < 1.6


def test_chosen_frames_are_the_chosen_ones():
  film = video.encode(numbered(), 24.)
  for indices in ([0], [23], [0, 1, 2], [3, 3, 3, 9, 20, 20], range(24)):
    assert number_on(video.frames(film, indices)).tolist() == list(indices)
  with pytest.raises(video.Unreadable, match="frame 24 was wanted of 24"):
    video.frames(film, [3, 24])


@pytest.mark.parametrize("size", [(32, 48), (24, 24), (20, 60), (64, 96), (33, 47)])
def test_scaling_covers_the_size_and_cuts_evenly(size):
  """Witness: Pillow's box filter on the centred window of the same shape."""
  height, width = 72, 128
  rows, columns = np.mgrid[:height, :width]
  picture = np.stack([2 * rows, columns, 120 + 40 * np.sin(columns / 20)], -1).astype(np.uint8)
  scale = min(height / size[0], width / size[1])
  box = ((width - size[1] * scale) / 2, (height - size[0] * scale) / 2)
  window = (*box, width - box[0], height - box[1])
  kernel = Image.Resampling.BOX if scale > 1 else Image.Resampling.BILINEAR
  wanted = np.asarray(Image.fromarray(picture).resize(size[::-1], kernel, window)).astype(int)
  assert abs(video.fit(picture, video.Size(*size)).astype(int) - wanted).mean() < 1.5
  decoded = video.frames(video.encode(np.repeat(picture[None], 2, 0), 24.), [1], video.Size(*size))[0]
  assert decoded.shape == (*size, 3) and abs(decoded.astype(int) - wanted).mean() < 3
  mask = picture[..., 1] > 64
  cut = video.fit_mask(mask, video.Size(*size))
  assert abs(cut.mean() - (wanted[..., 1] > 64).mean()) < .03


def test_a_flipped_bit_in_the_pictures_is_seen():
  rng, seen = np.random.default_rng(0), 0
  picture = cv2.GaussianBlur(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8), (0, 0), 2)
  whole = video.encode(np.stack([np.roll(picture, 2 * k, 1) for k in range(9)]), 12.)
  for place in rng.integers(whole.index(b"mdat") + 700, whole.index(b"moov") - 4, 20):
    spoilt = bytearray(whole)
    spoilt[place] ^= 8
    try:
      video.frames(bytes(spoilt), range(9))
    except video.Unreadable:
      seen += 1
  assert seen >= 17  # the rest still obeys the syntax, and only a checksum could tell


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 9))
def test_pacing_takes_the_frame_that_is_on_screen(fps, target, count, offset):
  """Witness: exact fractions of a second."""
  exact = [offset + int(Fraction(k, target) * fps) for k in range(count)]
  assert video.pace(float(fps), float(target), count, offset).tolist() == exact


@given(st.integers(1, 200), st.sampled_from([8., 12., 23.976, 24., 25., 29.97, 30., 60.]),
       st.sampled_from([8., 12., 16., 24.]))
def test_the_paced_length_is_the_largest_that_fits(frames, fps, target):
  length = video.paced_length(frames, fps, target)
  assert video.pace(fps, target, length)[-1] < frames <= video.pace(fps, target, length + 1)[-1]


# records

def test_a_record_comes_back_as_it_was():
  clip = clip_of("a")
  assert records.from_bytes(records.to_bytes(clip)) == clip


@pytest.mark.parametrize("spoil", [
  lambda r: b"", lambda r: r[:len(r) // 2], lambda r: b"\x01" + r, lambda r: b"words",
  lambda r: r.replace(b"caption", b"kaption"), lambda r: r.replace(b"CC0-1.0", b"\xff" * 7)])
def test_what_is_not_a_record_is_unreadable(spoil):
  with pytest.raises(video.Unreadable, match="not a clip record"):
    records.from_bytes(spoil(records.to_bytes(clip_of("a"))))


def test_the_character_comes_with_the_frames():
  frames, character = clip_of("a").look(np.array([2, 7, 7]), video.Size(32, 48))
  assert [np.unique(np.nonzero(mask)[1]).tolist() for mask in character] == [[2], [7], [7]]
  assert number_on(frames).tolist() == [2, 7, 7]


# batches

def test_every_record_comes_exactly_once_an_epoch_in_an_order_drawn_anew(folders):
  ids = np.concatenate([batch["id"] for batch in draw(Batches(folders[0], "9x32x48@4", fps=12), 15)])
  epochs = ids.reshape(6, 10)
  assert (np.sort(epochs, 1) == np.arange(10)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_fewer_records_than_a_batch_repeat(folders):
  batch, = draw(Batches(folders[1], "3x32x48@12", fps=12), 1)
  assert (np.sort(batch["id"].reshape(3, 4), 1) == np.arange(4)).all() and (batch["ok"] == 1).all()


def test_the_frames_are_the_records_own_at_the_wanted_pace_from_a_drawn_first(folders):
  batches = draw(Batches(folders[0], "5x32x48@5", fps=12), 12)
  firsts = set()
  for batch in batches:
    for frames, character, record, caption in zip(batch["frames"], batch["character"], batch["id"], batch["caption"],
                                                  strict=True):
      shown = number_on(frames)
      assert caption == f"clip one-{record}" and abs(frames[:, 2:6].mean() - 10 * record) < 3
      assert (np.diff(shown) == 2).all() and shown[0] >= 0 and shown[-1] < 24
      assert [np.unique(np.nonzero(mask)[1]).item() for mask in character] == shown.tolist()
      firsts.add(shown[0])
  assert firsts == set(range(16))  # 24 frames hold 16 places for a span of 9


@pytest.mark.parametrize("mixed", [False, True])
def test_the_global_order_is_the_same_for_one_two_and_four_hosts(folders, mixed):
  sources, sizes = (f"{folders[0]}=3,{folders[1]}=1", "5x32x48@8,1x16x16@4:3") if mixed else (folders[0], "5x32x48@8")
  whole = draw(Batches(sources, sizes, fps=12, seed=7), 12)
  for hosts in (2, 4):
    parts = [draw(Batches(sources, sizes, fps=12, seed=7, share=host_of(host, hosts)), 12) for host in range(hosts)]
    for batch, *rows in zip(whole, *parts, strict=True):
      joined = {key: np.concatenate([part[key] for part in rows]) for key in ("frames", "character", "id", "ok")}
      assert same(batch, joined | {"caption": [caption for part in rows for caption in part["caption"]]})
  assert len({batch["frames"].shape for batch in whole}) == (2 if mixed else 1)


def test_a_host_may_hold_any_parts_and_of_each_bucket_others(folders):
  sizes, held = "5x32x48@8,1x16x16@4:3", {"5x32x48": ([0, 2], 4), "1x16x16": ([1], 2)}
  whole = draw(Batches(folders[0], sizes, fps=12, seed=7), 12)
  mine = draw(Batches(folders[0], sizes, fps=12, seed=7, share=lambda b: held[f"{b.frames}x{b.height}x{b.width}"]), 12)
  rows = {5: [0, 1, 4, 5], 1: [2, 3]}
  for batch, part in zip(whole, mine, strict=True):
    places = rows[batch["frames"].shape[1]]
    assert same({**{key: batch[key][places] for key in ("frames", "character", "id", "ok")},
                 "caption": [batch["caption"][place] for place in places]}, part)


def test_hosts_know_by_a_number_whether_they_deal_the_same_records(folders, tmp_path):
  one, other = (Batches(folder, "5x16x24@4", fps=12, share=host_of(host, 2)).dealt
                for host, folder in enumerate([folders[0]] * 2))
  fewer = Batches(write_folder(tmp_path / "a", [clip_of("a")] * 3), "5x16x24@4", fps=12).dealt
  assert one == other != fewer
  long, short = clip_of("long", frames=48), clip_of("short")  # as many, and others
  there = [write_folder(tmp_path / name, clips, seconds=None) for name, clips in (("b", [long, short]),
                                                                                  ("c", [short, long]))]
  assert len({Batches(where, "17x16x24@1", fps=12).dealt for where in there}) == 2


def test_batches_of_another_size_do_not_go_on(folders):
  """A budget of tokens makes other batches of them on other devices."""
  position = Batches(folders[0], "5x32x48@4,1x16x16@8", fps=12).position
  with pytest.raises(BadInput, match=r"were of 4, 8 clips and are now of 2, 8, .* needs ...@4 in data.buckets"):
    Batches(folders[0], "5x32x48@2,1x16x16@8", fps=12).seek(position)


def test_records_that_are_others_than_they_were_are_told_of(folders):
  position, other = Batches(folders[0], "5x32x48@4", fps=12).position, Batches(folders[1], "5x32x48@4", fps=12)
  assert other.seek(position).startswith(", among 4 clips where there were 10: ") and other.seek(other.position) == ""
  del position["clips"]  # as runs saved it that are older
  assert other.seek(position) == ""


def test_a_host_reads_its_share_only(folders, monkeypatch):
  read, original = [], records.Records.__getitem__
  def noted(self, number):
    # Without threads it reads in this one; others may still be reading ahead for the tests before.
    if threading.current_thread() is threading.main_thread():
      read.append(number)
    return original(self, number)
  monkeypatch.setattr(records.Records, "__getitem__", noted)
  batches = Batches(folders[0], "5x32x48@4", fps=12, share=host_of(1, 2), threads=0)
  ids = np.concatenate([batch["id"] for batch in draw(batches, 7)])
  assert read == ids.tolist() and len(read) == 14


@pytest.mark.parametrize("sizes", ["5x32x48@4", "5x32x48@4,1x16x16@8:2"])
def test_seeking_continues_as_if_never_stopped_also_on_other_hosts(folders, sizes):
  source = ",".join(folders)
  steady = Batches(source, sizes, fps=12)
  before, position = draw(steady, 5), steady.position
  after = draw(steady, 4)
  assert position["global_next_index"] == 5 and position == json.loads(json.dumps(position))
  resumed = Batches(source, sizes, fps=12)
  draw(resumed, 1)
  resumed.seek(position)
  assert resumed.position == position
  assert all(same(one, other) for one, other in zip(after, draw(resumed, 4), strict=True))
  resumed.seek({"global_next_index": 0})
  assert all(same(one, other) for one, other in zip(before, draw(resumed, 5), strict=True))
  second = Batches(source, sizes, fps=12, share=host_of(1, 2))
  second.seek(position)
  for one, half in zip(after, draw(second, 4), strict=True):
    assert (one["id"][len(one["id"]) // 2:] == half["id"]).all()


def test_threads_change_nothing(folders):
  one, other = (draw(Batches(folders[0], "5x32x48@4", fps=12, threads=n), 6) for n in (0, 3))
  assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_sources_have_their_turns_by_weight(folders):
  ids = np.concatenate([b["id"] for b in draw(Batches(f"{folders[0]}=0.7,{folders[1]}=0.3", "1x16x16@20", fps=12), 10)])
  assert np.bincount(ids // 2**32).tolist() == [140, 60]
  second = ids[ids >= 2**32] - 2**32
  assert (np.sort(second.reshape(15, 4), 1) == np.arange(4)).all()


def test_another_seed_is_another_order(folders):
  one, other = (np.stack([b["id"] for b in draw(Batches(folders[0], "1x16x16@10", fps=12, seed=s), 3)]) for s in (0, 1))
  assert (one != other).any(1).all() and (one[1] != other[0]).any()  # nor is it the first one's next epoch


def test_sources_and_buckets_have_orders_of_their_own(folders):
  drawn = draw(Batches(f"{folders[0]},{folders[0]}", "1x16x16@20,1x8x8@20", fps=12), 8)
  batches = [next(batch for batch in drawn if batch["frames"].shape[2] == height) for height in (16, 8)]
  orders = [tuple(batch["id"][batch["id"] // 2**32 == source] % 2**32) for batch in batches for source in (0, 1)]
  assert len(set(orders)) == 4


@pytest.mark.parametrize("hosts", [1, 2])
def test_held_out_clips_come_once_each_in_order_from_their_first_frame(folders, hosts):
  parts = [list(Batches(",".join(folders), "5x32x48@4", fps=12, split="held_out", share=host_of(host, hosts)))
           for host in range(hosts)]
  ids, ok = (np.concatenate([np.concatenate([part[key] for part in rows]) for rows in zip(*parts, strict=True)])
             for key in ("id", "ok"))
  assert ids[ok == 1].tolist() == [0, 1, 2, 3, 4, 2**32] and len(ids) == 8 and (ok[:6] == 1).all()
  assert all(number_on(frames)[0] == 0 for part in parts for batch in part for frames in batch["frames"])
  assert Batches(",".join(folders), "5x32x48@4", fps=12, split="held_out").length == 6


@pytest.mark.parametrize("assign", ["any", "fit"])
def test_held_out_clips_are_those_of_the_sources_that_have_some(folders, tmp_path, assign):
  empty = write_folder(tmp_path / "empty", [clip_of("a")], write=records.write_clips)
  deal = Deal(buckets.parse("9x32x48@2"), assign=assign)
  batches = list(Batches(f"{empty},{folders[1]}", deal, fps=12, split="held_out"))
  assert [batch["id"].tolist() for batch in batches] == [[2**32] * 2] and batches[0]["ok"].tolist() == [1, 0]
  assert all(next(Batches(f"{empty},{folders[1]}", deal, fps=12))["ok"])


def test_buckets_take_turns_by_weight_and_each_goes_through_its_own_order():
  sizes = buckets.parse("9x32x48@16:3,17x64x96@4,1x8x8@2:0.5")
  turns = [buckets.Schedule(sizes, seed=3)[k] for k in range(2500)]
  shares = np.bincount([turn.bucket for turn in turns[:1000]]) / 1000
  assert np.allclose(shares, np.array([3, 1, .5]) / 4.5, atol=1e-3)
  for bucket in range(3):
    own = [turn.number for turn in turns if turn.bucket == bucket]
    assert own == list(range(len(own)))
  assert [turn.bucket for turn in turns[:1000]] != [turn.bucket for turn in turns[1000:2000]]


# damaged records

def test_a_bad_record_is_named_and_another_clip_stands_in_without_counting(tmp_path):
  clips = [clip_of(f"c{n}", colour=n) for n in range(6)]
  short = records.to_bytes(clip_of("short", frames=5))
  no_film = records.to_bytes(clip_of("x")).replace(b"ftyp", b"nope").replace(b"moov", b"nope")
  cut_off = records.to_bytes(clips[1])[:-900]
  folder = write_folder(tmp_path / "records", [clips[0], cut_off, clips[2], short, no_film, clips[5]])
  batches = Batches(folder, "9x32x48@6", fps=12)
  first, second = draw(batches, 2)
  for batch in (first, second):
    order = np.argsort(batch["id"])
    assert batch["id"][order].tolist() == list(range(6)) and batch["ok"][order].tolist() == [1, 0, 1, 0, 0, 1]
    assert colours(batch["frames"][order]) == [0, 2, 2, 5, 5, 5]  # the next readable one
  reasons = dict(batches.bad)
  assert set(reasons) == {f"{folder} record {n}" for n in (1, 3, 4)}
  assert "not a clip record" in reasons[f"{folder} record 1"] and "too short" in reasons[f"{folder} record 3"]
  assert "not a film" in reasons[f"{folder} record 4"]


def test_a_flipped_byte_in_a_shard_is_seen(tmp_path):
  folder = write_folder(tmp_path / "records", [clip_of(f"c{n}", colour=n) for n in range(6)])
  shard = Path(folder) / "train-00001-of-00002.arrayrecord"
  content = bytearray(shard.read_bytes())
  content[70000 if len(content) > 140000 else 1500] ^= 255
  shard.write_bytes(content)
  batches = Batches(folder, "9x32x48@6", fps=12)
  batch, = draw(batches, 1)
  assert batch["ok"].sum() == 5 and len(batches.bad) == 1 and "\n" not in batches.bad[0][1]


def test_a_full_disk_is_one_clear_line_and_leaves_no_shard(tmp_path):
  """A limit on the size of files stands for the full disk: the write itself fails."""
  record, limit = np.random.default_rng(0).bytes(200_000), resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
  try:
    with pytest.raises(BadInput, match=r"cannot write .*train.arrayrecord .*: make room and run again") as error:
      records.write_shard(tmp_path / "train.arrayrecord", [record])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)
  assert "\n" not in str(error.value) and not (tmp_path / "train.arrayrecord").exists()


def spoil(path):
  path.write_bytes(b"x" * path.stat().st_size)


def test_a_source_of_rubbish_stops_the_run(tmp_path):
  folder = write_folder(tmp_path / "records", [b"rubbish"] * 12)
  with pytest.raises(BadInput, match=r"8 records in a row cannot be used, the first is .* not a clip record"):
    next(Batches(folder, "9x32x48@2", fps=12))


@pytest.mark.parametrize(("harm", "words"), [
  (lambda folder: (folder / "index.json").unlink(), "packing never finished; make them with python data/pack.py"),
  (lambda folder: (folder / "index.json").write_text("{"), "index.json is damaged"),
  (lambda folder: (folder / "index.json").write_text("{}"), "index.json is damaged"),
  (lambda folder: (folder / "train-00000-of-00002.arrayrecord").unlink(), "00000-of-00002.arrayrecord is missing"),
  (lambda folder: (folder / "train-00001-of-00002.arrayrecord").write_bytes(b"x" * 100), "has 100 bytes"),
  (lambda folder: spoil(folder / "train-00001-of-00002.arrayrecord"), "a shard is damaged .*: copy the folder again")])
def test_a_folder_that_lost_something_is_one_clear_line(tmp_path, harm, words):
  folder = write_folder(tmp_path / "records", [clip_of("a"), clip_of("b")])
  harm(Path(folder))
  with pytest.raises(BadInput, match=words) as error:
    Batches(folder, "9x32x48@2", fps=12)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sources", "sizes", "options", "words"), [
  ("{0}/nowhere", "9x32x48@2", {}, "there is no such folder"),
  ("{0}=lots", "9x32x48@2", {}, "'lots', which is not a number"),
  ("{0}=-1", "9x32x48@2", {}, "positive weight"),
  ("", "9x32x48@2", {}, "a path and a positive weight"),
  ("{0}", "9x32@2", {}, "not of the form FRAMESxHEIGHTxWIDTH@BATCH"),
  ("{0}", "9x32x48", {}, "has no batch: write ...@BATCH, as in 9x32x48@16, or give a budget of tokens"),
  ("{0}", "9x32x48@0", {}, "has no clips: write a batch of at least 1"),
  ("{0}", "9x0x48@2", {}, "must have positive"),
  ("{0}", "9x32x48@2:0", {}, "must have positive"),
  ("{0}", "9x32x48@2:1,9x16x16@2:0.0001", {}, "gets none of 1000 batches"),
  ("{0}", "13x32x48@2", {}, "asks for 13 frames, .* last 1 s, 12 frames at 12 fps; .* pack with --clip_seconds 1.1"),
  ("{0}", "9x32x48@3", {"share": host_of(0, 2)}, "does not divide into 2 parts"),
  ("{0}", "9x32x48@2", {"split": "test"}, "no split is named 'test': allowed are train, held_out"),
  ("{0}", "9x32x48@2", {"fps": 0}, "0.0 frames a second"),
  ("{0}", "9x32x48@2", {"seed": -1}, "seed is -1"),
  ("{0}", "9x32x48@2", {"threads": -1}, "-1 loader threads"),
  ("tfds:no_such_set", "9x32x48@2", {}, "no prepared dataset in .*no_such_set: set TFDS_DATA_DIR")])
def test_wrong_settings_are_one_clear_line(folders, sources, sizes, options, words):
  with pytest.raises(BadInput, match=words) as error:
    Batches(sources.format(folders[0]), sizes, **{"fps": 12, **options})
  assert "\n" not in str(error.value)


def test_an_empty_split_and_a_foreign_position_are_refused(folders, tmp_path):
  folder = write_folder(tmp_path / "records", [clip_of("a")])
  with pytest.raises(BadInput, match="holds no 'held_out' records"):
    Batches(folder, "9x32x48@2", fps=12, split="held_out")
  for position in ({}, {"global_next_index": -1}, {"global_next_index": "5"}):
    with pytest.raises(BadInput, match="loader position"):
      Batches(folder, "9x32x48@2", fps=12).seek(position)


# tensorflow_datasets

class Numbered(tf_datasets.core.GeneratorBasedBuilder):
  """Six films as sequences of images, which is how a Video feature is stored, or as bytes of an mp4."""
  VERSION = tf_datasets.core.Version("1.0.0")
  name = "numbered"

  def __init__(self, *args, as_mp4, **kwargs):
    self.as_mp4 = as_mp4
    super().__init__(*args, **kwargs)

  def _info(self):
    words = tf_datasets.features.ClassLabel(names=["cat", "dog"]) if self.as_mp4 else tf_datasets.features.Text()
    film = {"mp4": tf_datasets.features.Tensor(shape=(), dtype=np.object_)} if self.as_mp4 else {
      "video": tf_datasets.features.Sequence(tf_datasets.features.Image(shape=(32, 48, 3), encoding_format="png"))}
    return tf_datasets.core.DatasetInfo(builder=self, features=tf_datasets.features.FeaturesDict(
      {**film, "label" if self.as_mp4 else "caption": words}))

  def _split_generators(self, manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for n in range(6):
      film = numbered(colour=n)
      if self.as_mp4:
        yield n, {"mp4": video.encode(film, 24.), "label": n % 2}
      else:
        pictures = [io.BytesIO() for _ in film]
        for frame, file in zip(film, pictures, strict=True):
          Image.fromarray(frame).save(file, "png")
          file.seek(0)
        yield n, {"video": pictures, "caption": f"film {n}"}


@pytest.fixture(scope="module", params=["pictures", "mp4"])
def prepared(request, tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  Numbered(as_mp4=request.param == "mp4", data_dir=root, file_format="array_record").download_and_prepare()
  features = root / "numbered" / "1.0.0" / "features.json"
  if request.param == "pictures":
    # What tfds.features.Video(shape=(None, 32, 48, 3)) writes; it cannot be made here, as it needs TensorFlow.
    content = json.loads(features.read_text())
    content["featuresDict"]["features"]["video"] = {
      "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
      "video": {"shape": {"dimensions": ["-1", "32", "48", "3"]}, "dtype": "uint8", "encodingFormat": "png"}}
    features.write_text(json.dumps(content))
  return root, request.param


def test_a_tensorflow_dataset_is_a_source_by_name_and_by_folder(prepared, folders, monkeypatch):
  root, kind = prepared
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  step = 2 if kind == "mp4" else 1  # pictures have no rate of their own and play one by one
  seen = []
  for name in ("tfds:numbered", f"tfds:{root}/numbered/1.0.0"):
    batch, = draw(Batches(name, "5x32x48@6", fps=12), 1)
    films = colours(batch["frames"])
    for frames, film, caption in zip(batch["frames"], films, batch["caption"], strict=True):
      assert (np.diff(number_on(frames)) == step).all()
      assert caption == (["cat", "dog"][film % 2] if kind == "mp4" else f"film {film}")
    assert (batch["ok"] == 1).all() and not batch["character"].any()
    assert sorted(films) == sorted(batch["id"]) == list(range(6))
    seen.append(batch)
  assert same(*seen)
  cut = "tfds:numbered:train[:4]:train[4:]"
  held_out, = Batches(cut, "5x32x48@2", fps=12, split="held_out")
  train, = draw(Batches(cut, "5x32x48@4", fps=12), 1)
  assert sorted([*colours(train["frames"]), *colours(held_out["frames"])]) == list(range(6))
  ids = np.concatenate([b["id"] for b in draw(Batches(f"tfds:numbered=1,{folders[0]}=1", "1x16x16@10", fps=12), 2)])
  assert np.bincount(ids // 2**32).tolist() == [10, 10]


def test_wrong_words_for_a_tensorflow_dataset_are_one_clear_line(prepared, monkeypatch, tmp_path):
  root, _ = prepared
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  for name, split, words in (("numbered:nowhere", "train", "has no split 'nowhere': allowed are train"),
                             ("numbered/config", "train", "no prepared dataset"),
                             ("numbered", "held_out", "does not say which split is held out")):
    with pytest.raises(BadInput, match=words):
      tfds.TfdsClips(name, split)
  about = json.loads((root / "numbered" / "1.0.0" / "dataset_info.json").read_text())
  (tmp_path / "dataset_info.json").write_text(json.dumps(about | {"fileFormat": "tfrecord"}))
  with pytest.raises(BadInput, match="stored as tfrecord: only array_record"):
    tfds.TfdsClips(str(tmp_path), "train")


def test_sources_are_read_from_one_string():
  assert mixture.parse("a/b=0.7, c,tfds:x/y:train[:90%]=2") == (
    mixture.Source("a/b", .7), mixture.Source("c"), mixture.Source("tfds:x/y:train[:90%]", 2.))
