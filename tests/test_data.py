"""The drawn films are what their truth says, and packing finds it again; bad films are named, never silently lost."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records, video

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

import cartoon
import pack
import toons

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, FPS = 64, 96, 12
SETTINGS = pack.Settings(clip_seconds=1.5, height=0, width=0, held_out=.3, threshold=27, crf=15, source="",
                         licence="unknown", shard_megabytes=256)


@pytest.fixture(scope="session")
def drawn():
  """Three films of two shots, as `draw_film` gives them."""
  return [toons.draw_film(seed, seconds=7, height=HEIGHT, width=WIDTH, fps=FPS) for seed in range(3)]


@pytest.fixture(scope="session")
def films(drawn, tmp_path_factory):
  folder = tmp_path_factory.mktemp("films")
  for number, film in enumerate(drawn):
    toons.write_film(folder, f"film-{number}", film)
  return folder


@pytest.fixture(scope="session")
def packed(films, tmp_path_factory):
  out = tmp_path_factory.mktemp("packed") / "records"
  pack.main(SETTINGS, films, out, workers=1)
  return out


def likeness(frames, truth):
  """PSNR of the brightness in dB. Colour has a quarter of the pixels in yuv420p, which at this size costs 10 dB."""
  difference = (frames.astype(float) - truth) @ [.299, .587, .114]
  return 10 * np.log10(255**2 / (difference**2).mean())


def all_clips(folder):
  splits = [records.Records(folder, split) for split in records.SPLITS]
  return [split[number] for split in splits for number in range(len(split))]


# drawing

def test_a_seed_is_a_film(drawn):
  again = toons.draw_film(1, seconds=7, height=HEIGHT, width=WIDTH, fps=FPS)
  assert (again[0] == drawn[1][0]).all() and (again[1] == drawn[1][1]).all() and again[2] == drawn[1][2]
  assert abs(drawn[0][0].astype(int) - drawn[1][0]).mean() > 10


@pytest.mark.parametrize("total", [1, 35, 36, 71, 72, 84, 168, 1000])
def test_shots_fill_the_film_and_last_three_seconds(total):
  lengths = toons.shot_lengths(np.random.default_rng(total), total, FPS)
  assert sum(lengths) == total and (len(lengths) == 1 or min(lengths) >= 3 * FPS)


def test_the_mask_is_where_the_main_character_is_seen():
  """Witness: the same frame with the main character painted in other colours differs in the mask and nowhere else."""
  other = {"paint": "white", "trim": "grey"}
  for seed in range(6):
    shot = toons.plan_shot(np.random.default_rng(seed), "at night", 3.5, 150)
    main = shot.characters[0]
    main.paint, main.trim = "red", "yellow"
    painted = replace(shot, characters=[replace(main, **other), *shot.characters[1:]])
    for u in (0., 1.2, 2.9):
      frame, mask, _ = toons.draw_frame(shot, u, 96, 144)
      differs = abs(toons.draw_frame(painted, u, 96, 144)[0].astype(int) - frame).max(-1) > 40
      # One pixel of tolerance: edges are anti-aliased. Eyes and outline keep their colour, so the mask may hold more.
      assert not (differs & ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)).any()
      assert differs.sum() > .5 * mask.sum()


def test_the_mask_leaves_out_what_stands_before_the_main_character():
  """Witness: the frames of the main character alone, and of the others alone."""
  covered = 0
  for seed in range(20):
    shot = toons.plan_shot(np.random.default_rng(seed), "at dusk", 3.5, 150)
    alone, others = (replace(shot, characters=part, scene=replace(shot.scene, bushes=[]))
                     for part in (shot.characters[:1], shot.characters[1:]))
    for u in (.5, 1.7, 2.9):
      frame, mask, _ = toons.draw_frame(shot, u, 96, 144)
      whole = toons.draw_frame(alone, u, 96, 144)[1]
      assert not (mask & ~whole).any()
      if others.characters:
        inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
        unchanged = (toons.draw_frame(others, u, 96, 144)[0] == frame).all(-1)
        assert (inside & unchanged).sum() <= .1 * inside.sum()
      covered += whole.sum() > 1.03 * mask.sum()
  assert covered > 5


def test_the_mask_follows_the_characters_written_path(drawn):
  for _, masks, truth in drawn:
    for shot in truth["shots"]:
      main = shot["characters"][0]
      for number, (x, y) in enumerate(zip(main["x"], main["y"], strict=True)):
        rows, columns = np.nonzero(masks[shot["start"] + number])
        if len(rows) > .04 * HEIGHT * WIDTH:
          assert abs(columns.mean() - x) < .25 * HEIGHT and abs(rows.mean() - y) < .25 * HEIGHT


def test_the_ground_moves_as_the_camera_says():
  """Witness: the shift at which two strips of empty ground agree best."""
  for seed in range(4):
    frames, _, truth = toons.draw_film(seed, seconds=3, height=200, width=300, fps=FPS)
    one, other = (frames[number, 192:].astype(int) for number in (0, 5))
    def disagreement(k, one=one, other=other):
      return abs(one[:, max(0, k):300 + min(0, k)] - other[:, max(0, -k):300 - max(0, k)]).mean()
    shift, camera = min(range(-80, 81), key=disagreement), truth["shots"][0]["camera"][5]
    # Where bushes stand before everything, it is they that fill the lowest rows.
    assert any(shift == pytest.approx(camera * truth["parallax"][layer], abs=1) for layer in ("ground", "foreground"))


def test_the_same_frames_give_the_same_bytes_whatever_lies_in_memory():
  film, rng, encoded = toons.draw_film(1, seconds=5)[0][18:36], np.random.default_rng(0), set()
  for _ in range(4):
    rubbish = [rng.integers(0, 256, size, dtype=np.uint8) for size in rng.integers(10000, 60000, 400)]
    del rubbish
    encoded.add(video.encode(film, 12.))
  assert len(encoded) == 1


def test_every_cut_is_between_places_that_differ():
  for seed in range(40):
    place = None
    for shot in toons.draw_film(seed, seconds=8, height=32, width=32, fps=2)[2]["shots"]:
      here = next(name for name in cartoon.PLACES if name in shot["caption"])
      assert place is None or cartoon.contrast(here, place) > 45
      place = here


def test_written_films_are_complete_and_their_pixels_are_the_drawn_ones(drawn, films):
  for number, (frames, masks, truth) in enumerate(drawn):
    path = films / f"film-{number}.mp4"
    assert video.facts(path) == (FPS, len(frames), HEIGHT, WIDTH)
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(truth))
    decoded = video.frames(path, range(len(frames)))
    assert likeness(decoded, frames) > 36 and likeness(decoded[1:], frames[:-1]) < 30
    with np.load(path.with_suffix(".masks.npz")) as file:
      assert (np.unpackbits(file["visible"], count=masks.size).reshape(file["shape"]) == masks).all()


# packing

def test_cuts_found_are_the_true_cuts(drawn, films):
  for number, (frames, _, truth) in enumerate(drawn):
    assert pack.find_cuts(films / f"film-{number}.mp4", 27) == (truth["cuts"], len(frames))


def test_no_clip_crosses_a_cut_and_each_has_its_shots_caption(drawn, packed):
  clips = all_clips(packed)
  assert len(clips) == sum(len(range(shot["start"], shot["end"] - 17, 18)) for _, _, t in drawn for shot in t["shots"])
  for clip in clips:
    shots = drawn[int(clip.film[5])][2]["shots"]
    first = int(clip.id.split("/")[1])
    shot, = (s for s in shots if s["start"] <= first and first + clip.frames <= s["end"])
    assert (clip.caption, clip.licence, clip.frames, clip.fps) == (shot["caption"], "CC0-1.0", 18, 12)


def test_clips_carry_the_films_pixels_and_masks(drawn, packed):
  for clip in all_clips(packed)[::3]:
    frames, masks, _ = drawn[int(clip.film[5])]
    first, size = int(clip.id.split("/")[1]), video.Size(HEIGHT, WIDTH)
    seen, character = clip.look(np.array([0, 5, 17]), size)
    wanted = [first, first + 5, first + 17]
    assert likeness(seen, frames[wanted]) > 33 > likeness(seen, frames[np.array(wanted) - 1 if first else [1, 6, 16]])
    assert (character == masks[wanted]).all()


def test_films_never_stand_in_both_splits_and_keep_their_split_when_others_come():
  clips = {f"film-{n}.mp4": 3 for n in range(40)}
  few, all_ = (pack.split_films(dict(list(clips.items())[:n]), .25) for n in (20, 40))
  for split in (few, all_):
    names = [{film for film, _ in split[name]} for name in records.SPLITS]
    assert not names[0] & names[1] and names[1]
  assert {film for film, _ in few["held_out"]} <= {film for film, _ in all_["held_out"]}
  assert {film for film, _ in few["train"]} <= {film for film, _ in all_["train"]}


@pytest.mark.parametrize(("clips", "train", "held_out"), [
  ({"a": 10}, {"a": range(9)}, {"a": range(9, 10)}),
  ({"a": 1}, {"a": range(1)}, {}),
  ({"a": 10, "b": 0}, {"a": range(9)}, {"a": range(9, 10)})])
def test_of_an_only_film_the_last_clips_are_held_out(clips, train, held_out):
  split = pack.split_films(clips, .1)
  assert dict(split["train"]) == train and dict(split["held_out"]) == held_out


def test_two_films_give_one_to_each_split():
  for names in (("a", "b"), ("c", "d"), ("e", "f")):
    split = pack.split_films(dict.fromkeys(names, 2), .5)
    assert len(split["train"]) == len(split["held_out"]) == 1


def shards(folder):
  return {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}


def test_an_interrupted_run_leaves_no_shards_and_goes_on_to_the_same_bytes(films, packed, tmp_path, monkeypatch):
  out = tmp_path / "records"
  cut, done = pack.cut_film, []
  def cut_two(folder, film, settings):
    if len(done) == 2:
      raise KeyboardInterrupt
    done.append(film)
    return cut(folder, film, settings)
  monkeypatch.setattr(pack, "cut_film", cut_two)
  with pytest.raises(KeyboardInterrupt):
    for film in pack.find_films(films):
      (out / "parts").mkdir(parents=True, exist_ok=True)
      pack.pack_film(films, out, film, SETTINGS)
  assert not shards(out)
  with pytest.raises(BadInput, match="packing never finished"):
    records.Records(out, "train")
  monkeypatch.setattr(pack, "cut_films", lambda *args: {
    film: reason for film in pack.find_films(films) if (reason := pack.pack_film(films, out, film, SETTINGS))})
  monkeypatch.setattr(pack, "cut_film", lambda folder, film, settings: (
    done.append(film) or cut(folder, film, settings)))
  pack.main(SETTINGS, films, out, workers=1)
  assert len(done) == len(set(done)) == 3  # the two finished films were not cut again
  assert shards(out) == shards(packed) and not (out / "parts").exists()


def test_a_finished_folder_is_left_alone_and_never_mixed(films, packed, capsys):
  before = shards(packed)
  pack.main(SETTINGS, films, packed, workers=1)
  assert "complete already" in capsys.readouterr().out
  with pytest.raises(BadInput, match="settings differ"):
    pack.main(replace(SETTINGS, crf=20), films, packed, workers=1)
  assert shards(packed) == before


# wrong inputs

def spoil(folder, good: Path):
  """Puts bad films of every kind into a folder; returns name -> what the reason must say."""
  (folder / "text.mp4").write_text("these are words, not pictures")
  (folder / "empty.mp4").write_bytes(b"")
  whole = good.read_bytes()
  (folder / "cut-off.mp4").write_bytes(whole[:len(whole) // 2])
  with av.open(str(good)) as film, av.open(str(folder / "early.mp4"), "w", options={"movflags": "faststart"}) as copy:
    stream = copy.add_stream_from_template(film.streams.video[0])
    for packet in film.demux(video=0):
      if packet.dts is not None:
        packet.stream = stream
        copy.mux(packet)
  early = (folder / "early.mp4").read_bytes()  # its index comes first, so it opens and ends too soon
  (folder / "early.mp4").write_bytes(early[:len(early) * 2 // 3])
  os.mkfifo(folder / "pipe.mp4")
  latin = os.fsdecode("caf\xe9.mp4".encode("latin-1"))
  (folder / latin).write_bytes(whole)
  (folder / "nowhere.mp4").symlink_to(folder / "gone.mp4")
  with av.open(str(folder / "sound.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 44100
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  rotten = bytearray(whole)
  rotten[3000:len(whole) * 2 // 3] = os.urandom(len(whole) * 2 // 3 - 3000)
  (folder / "rotten.mp4").write_bytes(rotten)
  for name, suffix, content in (("words", ".json", "{not json"), ("list", ".json", "[1]"),
                                ("masks", ".masks.npz", "no zip")):
    (folder / f"{name}.mp4").write_bytes(whole)
    (folder / f"{name}{suffix}").write_text(content)
  return {"text.mp4": "not a film", "empty.mp4": "0 bytes", "cut-off.mp4": "cut off",
          latin: "not UTF-8", "early.mp4": r"frames can be decoded", "pipe.mp4": "not a regular file",
          "nowhere.mp4": "No such file", "sound.mp4": "only sound", "rotten.mp4": "damaged", "words.mp4": "beside",
          "list.mp4": "beside", "masks.mp4": "beside"}


def _reads(film: str) -> str | None:
  """A reader that one film ends and another fails."""
  if film == "deadly":
    os._exit(1)
  if film == "last":
    raise OSError(28, "No space left on device")
  return {"odd": "is odd"}.get(film)


def test_a_film_that_ends_its_process_is_found_and_an_error_is_told_before_the_films_to_come(tmp_path):
  films = ["good", "deadly", "odd", *(f"film-{n}" for n in range(5))]
  told = dict(pack.side_by_side(_reads, films, 2))
  assert told == dict.fromkeys(films) | {"odd": "is odd", "deadly": "it ends the process that reads it"}
  seen = []
  with pytest.raises(OSError, match="No space"):
    seen.extend(film for film, _ in pack.side_by_side(partial(_slowly, tmp_path), ["last", *map(str, range(9))], 1))
  assert len(list(tmp_path.iterdir())) < 9


def _slowly(folder: Path, film: str) -> str | None:
  time.sleep(.2)
  (folder / film).touch()
  return _reads(film)


def test_bad_films_among_good_ones_are_skipped_counted_and_named(films, tmp_path, capsys):
  folder, out = tmp_path / "films", tmp_path / "records"
  folder.mkdir()
  (folder / "good.mp4").write_bytes((films / "film-0.mp4").read_bytes())
  (folder / "README.md").write_text("a note")
  reasons = spoil(folder, folder / "good.mp4")
  pack.main(replace(SETTINGS, licence="CC BY 3.0"), folder, out, workers=2)
  said, index = capsys.readouterr().out, json.loads((out / "index.json").read_text())
  assert set(index["skipped"]) == set(reasons) and f"{len(reasons)} films skipped" in said and "one film only" in said
  for name, words in reasons.items():
    assert words in index["skipped"][name] and "\n" not in index["skipped"][name]
  assert all((clip.film, clip.licence, clip.character) == ("good.mp4", "CC BY 3.0", None) for clip in all_clips(out))


def test_only_bad_films_are_one_clear_line(films, tmp_path):
  spoil(tmp_path, films / "film-0.mp4")
  with pytest.raises(BadInput, match=r"none of the 12 films .* gave a clip: .*cut off") as error:
    pack.main(SETTINGS, tmp_path, tmp_path / "out", workers=2)
  assert "\n" not in str(error.value)


def test_films_without_a_shot_of_that_length_are_one_clear_line(films, tmp_path):
  with pytest.raises(BadInput, match="no shot of 60 s, take a smaller --clip_seconds"):
    pack.main(replace(SETTINGS, clip_seconds=60), films, tmp_path, workers=1)


def test_a_folder_without_films_is_one_clear_line(tmp_path):
  (tmp_path / "notes.txt").write_text("nothing to see")
  with pytest.raises(BadInput, match=r"no films in .*among 1 entries; python data/toons.py draws some"):
    pack.find_films(tmp_path)
  with pytest.raises(BadInput, match="is not a folder"):
    pack.find_films(tmp_path / "notes.txt")


@pytest.mark.parametrize(("name", "value"), [
  ("clip_seconds", 0), ("height", 33), ("width", -2), ("crf", 99), ("held_out", 1), ("threshold", 0),
  ("shard_megabytes", 0)])
def test_settings_out_of_range_are_refused(name, value):
  with pytest.raises(BadInput, match=f"--{name} is {value}"):
    pack.Settings(**{**asdict(SETTINGS), name: value})


def test_the_scripts_draw_and_pack_and_exit_with_2_on_bad_input(tmp_path):
  def script(name, *flags):
    return subprocess.run([sys.executable, str(ROOT / "data" / f"{name}.py"), *flags], capture_output=True, text=True,
                          cwd=tmp_path)
  size = ("--films", "2", "--seconds", "3", "--height", "32", "--width", "48", "--workers", "1")
  assert "2 of them drawn now" in script("toons", "--out", "films", *size).stdout
  assert "0 of them drawn now" in script("toons", "--out", "films", *size).stdout
  assert script("pack", "--films", "films", "--out", "records", "--clip_seconds", "1").returncode == 0
  assert len(all_clips(tmp_path / "records")) == 6
  for name, flags, words in (("toons", ("--out", "films", *size, "--fps", "24"), "drawn with other settings (fps)"),
                             ("toons", ("--out", "x", "--width", "33"), "even number of pixels"),
                             ("toons", ("--film", "3"), "no flag is named --film: did you mean 'films'?"),
                             ("toons", ("--zzz", "3"), "no flag is named --zzz: see --help."),
                             ("toons", ("many",), "unexpected words many"),
                             ("pack", ("--films", "nowhere"), "--out must have a value"),
                             ("pack", ("--films", "nowhere", "--out", "x"), "is not a folder"),
                             ("pack", ("--films", "films", "--out", "films/toon-0-0000.mp4"), "cannot write")):
    result = script(name, *flags)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
