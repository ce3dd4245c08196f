"""Rows of several clips hold every clip once a pass, and train as if each clip had a row of its own."""

import itertools
import json
import math

import numpy as np
import pytest
import stored
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets, packing
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.mixture import Batches

SIZES = {"17x32x48": 7, "9x32x48": 11, "5x32x48": 6, "1x32x48": 5, "9x16x16": 3}  # latent frames 5, 3, 2, 1
HELD = {"9x32x48": 3, "5x32x48": 2}
CLIPS = 29  # of 32x48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return stored.write(tmp_path_factory.mktemp("stored") / "one", {"train": SIZES, "held_out": HELD})


def deal(text="17x32x48@4", clips=3, **more):
  return Deal(buckets.parse(text), packed=clips, stride=4, **more)


def draw(batches, count):
  return [next(batches) for _ in range(count)]


def ids(batches):
  found = np.concatenate([batch["id"].ravel() for batch in batches])
  return found[found >= 0]


def same(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one if k != "caption") and (
    one["caption"] == other["caption"])


# which clips share a row


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4, unique_by=lambda x: x[0]),
       st.integers(1, 5))
@settings(deadline=None)
def test_rows_hold_all_clips_once_and_are_nearly_as_few_as_can_be(classes, most):
  lengths, counts = zip(*classes, strict=True)
  frames = 9
  found = packing.patterns(lengths, counts, frames, most)
  for pattern in found:
    assert 0 < sum(pattern.clips) <= most and pattern.rows > 0
    assert sum(c * x for c, x in zip(pattern.clips, lengths, strict=True)) <= frames
  held = [sum(pattern.rows * pattern.clips[i] for pattern in found) for i in range(len(counts))]
  assert held == list(counts)
  rows, all_frames = sum(pattern.rows for pattern in found), sum(map(math.prod, classes))
  assert rows >= max(-(-all_frames // frames), -(-sum(counts) // most))
  if most >= frames:  # first-fit decreasing, clip by clip: the witness
    room = []
    for length in sorted((x for x, count in classes for _ in range(count)), reverse=True):
      at = next((i for i, left in enumerate(room) if left >= length), None)
      if at is None:
        room.append(frames)
        at = -1
      room[at] -= length
    assert rows == len(room)


def test_a_pass_has_every_clip_once_in_rows_and_an_order_drawn_anew(folder):
  batches = Batches(folder, deal(), fps=12)
  assert batches.length == CLIPS and batches.encoded
  plan = packing.patterns([5, 3, 2, 1], [7, 11, 6, 5], 5, 3)
  rows = sum(pattern.rows for pattern in plan)
  drawn = draw(batches, rows)  # four rows each: four passes
  by_row = np.concatenate([batch["id"] for batch in drawn]).reshape(4, rows, 3)
  passes = [sorted(one[one >= 0].tolist()) for one in by_row]
  assert all(len(one) == CLIPS == len(set(one)) and one == passes[0] for one in passes)
  assert len({one.tobytes() for one in by_row}) == 4
  together = [{frozenset(row[row >= 0].tolist()) for row in one} for one in by_row]
  assert together[0] != together[1]  # not the same clips share a row each time


def test_a_row_is_its_clips_one_after_the_other(folder):
  seen = set()
  for batch in draw(Batches(folder, deal(), fps=12), 20):
    for name, shape in (("latents", (4, 5, 4, 6, 3)), ("known", (4, 5, 4, 6, 3)), ("mask", (4, 20, 4, 6)),
                        ("text", (4, 3, 5, 8)), ("image", (4, 3, 2, 7)), ("segment", (4, 5)), ("ok", (4, 3))):
      assert batch[name].shape == shape
    for row in range(4):
      segment, captions = batch["segment"][row], batch["caption"][row]
      lengths = [(segment == k).sum() for k in range(3)]
      assert segment.tolist() == [k for k, n in enumerate(lengths) for _ in range(n)] + [-1] * (5 - sum(lengths))
      assert len(captions) == np.count_nonzero(lengths)
      seen.add(tuple(sorted(n for n in lengths if n)))
      for k, caption in enumerate(captions):
        number, of = int(caption.split()[1]), segment == k
        wanted = np.float16(number + np.arange(lengths[k]) / 100)
        assert (batch["latents"][row, of] == wanted[:, None, None, None]).all()
        assert abs(batch["known"][row, of].astype(float) - 1000 - wanted[:, None, None, None]).max() < 1
        given_frames = batch["mask"][row].reshape(5, 4, 4, 6)[of].all((1, 2, 3))
        assert given_frames.tolist() == [True] + [False] * (lengths[k] - 1)  # frame 0 fills its latent frame
        words = 1 + number % 5
        assert (batch["text"][row, k, :words] == number).all() and (batch["text"][row, k, words:] == 0).all()
        assert (batch["image"][row, k] == number).all()
      empty = segment < 0
      assert not batch["latents"][row, empty].any() and not batch["mask"][row].reshape(5, -1)[empty].any()
      assert (batch["id"][row] >= 0).sum() == len(captions)
  assert seen >= {(5,), (2, 3)}


@pytest.mark.parametrize("text", ["17x32x48@4", "17x32x48@4,9x32x48@2:2,9x16x16@4"])
def test_rows_are_the_same_on_any_number_of_hosts_and_after_any_stop(folder, text):
  whole = Batches(folder, deal(text), fps=12, seed=3)
  before, position = draw(whole, 6), whole.position
  after = draw(whole, 6)
  parts = [draw(Batches(folder, deal(text), fps=12, seed=3, shard=(host, 2)), 12) for host in range(2)]
  for batch, one, other in zip(before + after, *parts, strict=True):
    joined = {name: one[name] + other[name] if name == "caption" else np.concatenate([one[name], other[name]])
              for name in batch}
    assert same(batch, joined)
  resumed = Batches(folder, deal(text), fps=12, seed=3)
  resumed.seek(json.loads(json.dumps(position)))
  assert all(map(same, after, draw(resumed, 6)))
  again = Batches(folder, deal(text), fps=12, seed=4)
  assert not all(map(same, before, draw(again, 6)))


def test_held_out_clips_come_once_and_in_order_and_the_last_batch_ends_in_empty_rows(folder):
  batches = list(Batches(folder, deal(), fps=12, split="held_out"))
  rows = np.concatenate([batch["segment"] for batch in batches])
  assert len(batches) == 1 and sorted(ids(batches) % 2**32) == [0, 0, 1, 1, 2]
  assert [(row >= 0).sum() for row in rows] == [5, 5, 3, 0]  # 3 + 2, 3 + 2, 3
  assert all((batch["ok"] == 1).all() for batch in batches)


def test_sources_have_their_turns_by_weight_whatever_the_lengths(folder, tmp_path):
  other = stored.write(tmp_path / "two", {"train": {"17x32x48": 2, "5x32x48": 6}}, first=101)
  drawn = draw(Batches(f"{folder}=0.75,{other}=0.25", deal(clips=5), fps=12), 150)
  found = ids(drawn)
  second = found[found // 2**32 % 2**16 == 1]
  assert abs(len(second) / len(found) - 0.25) < 0.02
  long = (second // 2**48 == 5).mean()  # 2 of its 8 clips
  assert abs(long - 0.25) < 0.04


def test_every_size_goes_to_the_shortest_rows_that_hold_it_where_records_are_assigned(folder):
  drawn = draw(Batches(folder, deal("17x32x48@2,9x32x48@2", assign="fit"), fps=12), 60)
  lengths = {5: set(), 3: set()}
  for batch in drawn:
    counts = (batch["segment"][:, None] == np.arange(3)[:, None]).sum(-1)
    lengths[batch["segment"].shape[1]] |= set(counts.ravel().tolist()) - {0}
  assert lengths == {5: {5}, 3: {3, 2, 1}}
  counts = np.unique(ids(drawn), return_counts=True)[1]
  assert len(counts) == CLIPS and counts.max() - counts.min() <= 2  # ahead by the batch that is being filled


@pytest.mark.parametrize(("sources", "text", "clips", "words"), [
  ("{0}", "17x48x48@4", 3, "hold no 'train' latents of 48x48 and up to 17 frames"),
  ("{1}", "17x32x48@4", 3, "holds clips, and only latents share rows"),
  ("tfds:x", "17x32x48@4", 3, "holds clips, and only latents share rows"),
  ("{0}", "17x32x48@4", -1, "take 0 for one clip a row")])
def test_what_cannot_share_rows_is_one_clear_line(folder, tmp_path, sources, text, clips, words):
  (tmp_path / "clips").mkdir()
  with pytest.raises(BadInput, match=words) as error:
    Batches(sources.format(folder, tmp_path / "clips"), deal(text, clips), fps=12)
  assert "\n" not in str(error.value)


def test_all_lengths_of_a_row_are_met():
  """Whatever a pass asks for, the places of each length are 0, 1, 2, ... over all rows and passes."""
  plan = packing.Plan(packing.patterns([3, 2], [5, 7], 5, 4), (0, 0))
  found = list(itertools.chain.from_iterable(plan[row] for row in range(4 * plan.count)))
  for length, count in ((0, 5), (1, 7)):
    assert [place for one, place in found if one == length] == list(range(4 * count))
