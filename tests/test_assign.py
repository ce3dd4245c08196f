"""Each record goes to the bucket that keeps most of it, and comes once a pass, on any number of hosts."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hosts import host_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loaders import clip_of, write_folder

from anisora_jax.errors import BadInput
from anisora_jax.loaders import assign, buckets, mixture, records, tfds, video
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.mixture import Batches


def deal(text):
  return Deal(buckets.parse(text), assign="fit")


def sized(name, height, width, frames=24):
  film = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None], height, 1).repeat(width, 2).repeat(3, 3)
  return replace(clip_of(name), frames=frames, height=height, width=width, mp4=video.encode(film, 24.), character=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """7 wide clips, 5 high ones, 3 small ones, in one folder."""
  clips = [sized(f"{name}{n}", *size) for name, size, count in (("wide", (32, 64), 7), ("high", (64, 32), 5),
                                                                ("small", (16, 32), 3)) for n in range(count)]
  return write_folder(tmp_path_factory.mktemp("sized") / "all", clips, clips[:4])


# which bucket


@pytest.mark.parametrize(("clip", "best"), [
  ((81, 480, 832), "81x480x832"), ((500, 1080, 1920), "81x720x1280"), ((81, 1920, 1080), "81x832x480"),
  ((81, 900, 900), "81x480x832"),                       # a square would keep more, but there is none
  ((80, 1080, 1920), "33x720x1280"), ((81, 720, 720), "81x480x832"),
  ((81, 300, 500), "81x480x832"),                       # too small for all: enlarged least
  ((10, 1080, 1920), "17x480x832")])                    # too short for all: the shortest, which will refuse it
def test_a_clip_goes_where_most_of_it_is_kept(clip, best):
  sizes = buckets.parse("81x480x832@1,81x720x1280@1,81x832x480@1,33x720x1280@1,17x480x832@1")
  found = assign.fit(np.array([clip], float), sizes)
  assert buckets.parse(f"{best}@1")[0] == sizes[found[0]]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=9),
       st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4))
@settings(deadline=None)
def test_no_other_bucket_keeps_more(clips, asked):
  """Witness: fractions, clip by clip."""
  sizes = [buckets.Bucket(*of, batch=1) for of in asked]
  for (frames, height, width), best in zip(clips, assign.fit(np.array(clips, float), sizes), strict=True):
    def kept(bucket, height=height, width=width):
      scale = min(Fraction(height, bucket.height), Fraction(width, bucket.width))
      shown = Fraction(bucket.height * bucket.width) * scale**2 / (height * width)
      return scale, float(bucket.frames * bucket.height * bucket.width * shown)
    long = [bucket for bucket in sizes if bucket.frames <= frames]
    large = [bucket for bucket in long if kept(bucket)[0] >= 1]
    chosen = sizes[best]
    if large:
      assert chosen in large and kept(chosen)[1] >= max(kept(bucket)[1] for bucket in large) * (1 - 1e-9)
    elif long:
      assert chosen in long and kept(chosen)[0] >= max(kept(bucket)[0] for bucket in long) * (1 - 1e-9)
    else:
      assert chosen.frames == min(bucket.frames for bucket in sizes)


# when


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_every_row_of_a_bucket_has_come_once_at_the_end_of_each_pass(shares, seed):
  sizes = [buckets.Bucket(1, 8, 8, batch) for _, batch in shares]
  counts = [Fraction(count) for count, _ in shares]
  turns, had, taken = assign.Passes(sizes, counts, seed), Counter(), Counter()
  length, batch = sum(-(-count // size) for count, size in shares), 0
  ends = [sum(-(-number * count // size) for count, size in shares) for number in range(6)]
  for number, end in enumerate(ends):
    while batch < end:
      turn = turns[batch]
      assert turn.number == had[turn.bucket]
      had[turn.bucket] += 1
      taken[turn.bucket] += sizes[turn.bucket].batch
      batch += 1
    for bucket, (count, size) in enumerate(shares):
      assert 0 <= taken[bucket] - number * count < size  # all of the passes, and what fills the last batch
  assert ends[1] == length


def test_turns_are_drawn_anew_in_each_pass_and_by_seed():
  sizes = buckets.parse("1x8x8@1,1x8x16@1")
  def order(number, seed):
    turns = assign.Passes(sizes, [Fraction(20), Fraction(20)], seed)
    return tuple(turns[40 * number + k].bucket for k in range(40))
  assert len({order(number, seed) for number in range(3) for seed in range(3)}) == 9
  assert all(sum(order(number, 0)) == 20 for number in range(3))


# batches


SIZES = "5x32x64@4,5x64x32@2,5x16x32@2"


@pytest.mark.parametrize("hosts", [1, 2])
def test_every_record_comes_once_a_pass_in_its_own_bucket_on_any_number_of_hosts(folder, hosts):
  parts = [Batches(folder, deal(SIZES), fps=12, share=host_of(host, hosts), seed=1) for host in range(hosts)]
  assert parts[0].length == 15
  seen, shapes = Counter(), {}
  for _ in range(2 + 3 + 2):  # 7 / 4, 5 / 2, 3 / 2, rounded up
    rows = [next(part) for part in parts]
    for batch in rows:
      for record, caption in zip(batch["id"], batch["caption"], strict=True):
        seen[int(record)] += 1
        shapes.setdefault(caption.split()[1].rstrip("0123456789"), set()).add(batch["frames"].shape[2:4])
  assert shapes == {"wide": {(32, 64)}, "high": {(64, 32)}, "small": {(16, 32)}}
  assert len(seen) == 15 and sum(seen.values()) == 8 + 6 + 4 and max(seen.values()) == 2
  for _ in range(14 * 7):
    for part in parts:
      for record in next(part)["id"]:
        seen[int(record)] += 1
  # no record is ever more than a batch ahead of another of its bucket
  for numbers in (range(7), range(7, 12), range(12, 15)):
    assert max(seen[k] for k in numbers) - min(seen[k] for k in numbers) <= 1


def test_stopping_changes_nothing(folder):
  steady = Batches(folder, deal(SIZES), fps=12)
  for _ in range(9):
    next(steady)
  resumed = Batches(folder, deal(SIZES), fps=12)
  resumed.seek(json.loads(json.dumps(steady.position)))
  for _ in range(6):
    one, other = next(steady), next(resumed)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_held_out_records_come_once_in_their_own_buckets(folder):
  batches = list(Batches(folder, deal("5x32x64@4"), fps=12, split="held_out"))
  assert [batch["id"].tolist() for batch in batches] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("text", "words"), [
  (SIZES + ",5x48x8@2", "bucket 5x48x8@2:1 is the best for no 'train' record: leave it out"),
  ("5x32x64@4:2,5x64x32@2", "buckets have weights")])
def test_what_cannot_be_assigned_is_one_clear_line(folder, text, words):
  with pytest.raises(BadInput, match=words) as error:
    Batches(folder, deal(text), fps=12)
  assert "\n" not in str(error.value)
  with pytest.raises(BadInput, match="assignment of records"):
    Deal(buckets.parse(SIZES), assign="best")


@pytest.mark.parametrize("told", [True, False], ids=["by the index", "by an old index"])
def test_clips_of_many_lengths_go_to_buckets_that_they_are_long_enough_for(told, tmp_path, monkeypatch):
  """Ten of 24 frames at the wanted pace, ten of 6, and two of 3, which are too short for all; held out are only short
  ones. None need be read to know."""
  clips = {name: [sized(f"{name}{n}", 32, 64, frames) for n in range(count)]
           for name, frames, count in (("long", 48, 10), ("short", 12, 10), ("tiny", 6, 2))}
  train, held_out = list(itertools.chain(*clips.values())), clips["tiny"] + clips["short"][:3]
  where = write_folder(tmp_path / "all", train, held_out, seconds=None,
                       write=records.write_clips if told else records.write_shard)

  def dealt(*made, **more):
    with monkeypatch.context() as patch:
      if told:
        patch.setattr(records.Records, "__getitem__", lambda *_: pytest.fail("a record was read"))
      return Batches(where, *made, fps=12, threads=0, **more)

  for sizes, of_short in (("17x32x64@2,5x32x64@4", {"long", "short"}), (deal("17x32x64@2,5x32x64@4"), {"short"})):
    batches, seen = dealt(sizes), {5: set(), 17: set()}
    for _ in range(20):
      batch = next(batches)
      assert batch["ok"].all() and not batches.bad
      seen[batch["frames"].shape[1]] |= {caption.split()[1].rstrip("0123456789") for caption in batch["caption"]}
    assert seen == {5: of_short, 17: {"long"}} and batches.short == 2
    held = list(dealt(sizes, split="held_out"))
    assert [batch["frames"].shape[:2] for batch in held] == [(4, 5)] and held[0]["ok"].sum() == 3
  with pytest.raises(BadInput, match="bucket 25x32x64@2:1: all 'train' clips are shorter: take fewer frames"):
    dealt("25x32x64@2,5x32x64@4")
  with pytest.raises(BadInput, match="all 'held_out' clips are shorter than every bucket"):
    dealt("17x32x64@2", split="held_out")


@pytest.mark.parametrize("assign", ["any", "fit"])
def test_packs_of_two_lengths_are_trained_on_together(assign, tmp_path):
  """Each length in a bucket of its own, which the other pack's clips would be too short for, or also serve."""
  packs = [write_folder(tmp_path / name, [sized(f"{name}{n}", 32, 64, frames) for n in range(4)], seconds=frames / 24)
           for name, frames in (("long", 48), ("short", 12))]
  sources, seen = ",".join(packs), {5: set(), 17: set()}
  batches = Batches(sources, Deal(buckets.parse("17x32x64@2,5x32x64@4"), assign=assign), fps=12)
  for _ in range(12):
    batch = next(batches)
    assert batch["ok"].all() and not batches.bad
    seen[batch["frames"].shape[1]] |= set((batch["id"] >> 32).tolist())
  assert seen == {17: {0}, 5: {0, 1} if assign == "any" else {1}} and not batches.short
  with pytest.raises(BadInput, match=r"bucket 25x32x64@2:1 asks for 25 frames, but clips of .*long last 2 s, 24 f"):
    Batches(sources, Deal(buckets.parse("25x32x64@2,5x32x64@4"), assign=assign), fps=12)


class Untold(tfds.TfdsClips):
  """Clips of so many frames each, of which none tells its length before it is read, as in a TensorFlow dataset."""
  name, seconds = "untold", None

  def __init__(self, *lengths):
    self._lengths = lengths

  def __len__(self):
    return len(self._lengths)

  def __getitem__(self, number):
    frames = self._lengths[number]
    return tfds.Pixels(f"untold/{number}", f"of {frames}", None, list(np.zeros((frames, 8, 8, 3), np.uint8)))


def test_for_any_number_of_clips_that_are_too_short_others_stand_in_and_count(monkeypatch):
  monkeypatch.setattr(mixture, "open_source", lambda path, split: Untold(*[3] * 30, *[9] * 10))
  batches = Batches("untold", "5x8x8@8", fps=12)
  for _ in range(5):
    batch = next(batches)
    assert batch["ok"].all() and set(batch["caption"]) == {"of 9"}
  assert batches.bad and all("is too short" in reason for _, reason in batches.bad)
  held_out = Batches("untold", "5x8x8@8", fps=12, split="held_out")
  assert sum(batch["ok"].sum() for batch in held_out) == 10  # none of them twice
  monkeypatch.setattr(mixture, "open_source", lambda path, split: Untold(*[3] * 30))
  with pytest.raises(BadInput, match=r"30 records in a row .* untold record .* too short.*: take .*data.assign=fit"):
    next(Batches("untold", "5x8x8@8", fps=12))


def test_a_record_that_cannot_be_read_is_named_and_stood_in_for(tmp_path):
  clips = [sized(f"wide{n}", 32, 64) for n in range(4)]
  folder = write_folder(tmp_path / "all", [*clips, records.to_bytes(clips[0])[:-900]])
  batches = Batches(folder, deal("5x32x64@5"), fps=12)
  batch = next(batches)
  assert sorted(batch["ok"]) == [0, 1, 1, 1, 1] and "not a clip record" in dict(batches.bad)[f"{folder} record 4"]


def test_who_stands_in_is_of_the_same_bucket(tmp_path):
  """The records after the one that cannot be read are too short for its bucket."""
  wide, damaged = (sized(name, 32, 64, frames=48) for name in ("wide", "damaged"))
  short = [sized(f"short{n}", 32, 64, frames=12) for n in range(12)]
  folder = write_folder(tmp_path / "all", [wide, replace(damaged, mp4=damaged.mp4[:60]), *short], seconds=None)
  batches = Batches(folder, deal("17x32x64@2,5x32x64@4"), fps=12)
  long = next(batch for batch in batches if batch["frames"].shape[1] == 17)
  assert sorted(long["ok"]) == [0, 1] and long["caption"] == ["clip wide"] * 2
