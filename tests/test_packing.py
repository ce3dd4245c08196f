"""Rows of several clips hold every clip once a pass, and train as if each clip had a row of its own."""

import functools
import itertools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
from hosts import host_of
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax import keys
from anisora_jax.diffusion import path
from anisora_jax.diffusion.times import PATTERNS, TimeDraw
from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets, packing
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.mixture import Batches
from anisora_jax.models.pixels import Pixels
from anisora_jax.models.wan import placement as wan_placement
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import placement
from anisora_jax.tasks.masks import Mixture
from anisora_jax.training import step

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
                        ("text", (4, 3, 5, 8)), ("image", (4, 3, 2, 8)), ("segment", (4, 5)), ("ok", (4, 3))):
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
  parts = [draw(Batches(folder, deal(text), fps=12, seed=3, share=host_of(host, 2)), 12) for host in range(2)]
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


def test_held_out_rows_are_those_of_the_buckets_that_have_clips(folder):
  held = list(Batches(folder, deal("1x32x48@2,17x32x48@4"), fps=12, split="held_out"))
  assert [batch["segment"].shape for batch in held] == [(4, 5)]
  with pytest.raises(BadInput, match="hold no 'held_out' latents"):
    Batches(folder, deal("1x32x48@2"), fps=12, split="held_out")


def test_a_bucket_draws_from_the_folders_that_have_its_size(folder, tmp_path):
  """One clip a row; of those held out there may be none for a bucket."""
  other, text = stored.write(tmp_path / "other", {"train": {"9x32x48": 4}}), "17x32x48@2,9x32x48@2"
  sources = {}
  for batch in draw(Batches(f"{folder},{other}", text, fps=12), 20):
    sources.setdefault(len(batch["latents"][0]), set()).update((batch["id"] >> 32).tolist())
  assert sources == {5: {0}, 3: {0, 1}}
  held = list(Batches(folder, text, fps=12, split="held_out"))
  assert [batch["latents"].shape[:2] for batch in held] == [(2, 3)] * 2
  with pytest.raises(BadInput, match="holds no 'held_out' latents of 9x32x48"):
    Batches(other, "9x32x48@2", fps=12, split="held_out")


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


# what is learned from them

SIZE = Size(layers=2, width=48, heads=4, mlp=64, channels=3, given=7, text_width=8, text_tokens=6, image_width=8,
            waves=16)
NOW = 3


def method_of(mesh, kernel="dense", **more):
  network = WanDiT(SIZE, mesh, "ring", kernel)

  def velocity(params, x, t, given, text):
    return network.apply({"params": params}, x, t, text, given.channels(), given.image, given.segment)

  times = TimeDraw(per_frame=0.7, shift=3.0, pattern="rolling")  # the pattern that a clip's length decides most
  return step.Method(velocity, Pixels(temporal=4), Mixture({"none": 1.0}), times, weight="bell", drop_text=0.3, seed=5,
                     **more)


@functools.cache
def parameters():
  """Random ones: as they start, the velocity is 0, and nothing would be seen of the rest."""
  draw, mesh = np.random.default_rng(0), meshes.build()
  x, f = jnp.zeros((1, 2, *stored.CELLS, 3)), 2
  shapes = jax.eval_shape(lambda: WanDiT(SIZE, mesh).init(
    jax.random.key(0), x, jnp.zeros((1, f)), jnp.zeros((1, 6, 8)), jnp.zeros((1, f, *stored.CELLS, 7)),
    jnp.zeros((1, *stored.IMAGE)))["params"])
  return jax.tree_util.tree_map_with_path(
    lambda at, leaf: np.float32(draw.normal(at[-1].key == "scale", 0.25, leaf.shape)), shapes)


@functools.cache
def packed_batch(folder):
  """4 rows of up to 3 clips; what is in them is noise, and one could not be read."""
  batch, draw = next(Batches(folder, deal(), fps=12, seed=2)), np.random.default_rng(1)
  seen = (batch["segment"] >= 0)[..., None, None, None]
  latents, known = (draw.normal(size=batch["latents"].shape) * seen for _ in range(2))
  mask = draw.uniform(size=batch["mask"].shape) < 0.3
  mask = mask | (np.arange(20) // 4 == 3)[:, None, None]  # some frames are given whole
  for row, of in enumerate(batch["segment"]):
    for frame in np.flatnonzero(np.diff(of, prepend=-1)):  # the first of each clip fills a latent frame
      mask[row, 4 * frame:4 * frame + 4] = mask[row, 4 * frame + 3]
  ok = batch["ok"].copy()
  ok[1, 0] = 0
  text, image = draw.normal(size=batch["text"].shape), draw.normal(size=batch["image"].shape)
  made = {"latents": latents, "known": known, "mask": mask, "text": text, "image": image, "ok": ok}
  return {name: x if x.dtype == bool else np.float32(x) for name, x in made.items()} | {"segment": batch["segment"]}


def apart(batch):
  """(number of the sample, the clip alone in a row of its own length), of every clip."""
  for row, of in enumerate(batch["segment"]):
    for k in range(of.max() + 1):
      frames, = np.nonzero(of == k)
      pixels = np.arange(4 * frames[0] + 3, 4 * frames[-1] + 4)  # frame 0 once
      alone = {name: batch[name][row, frames][None] for name in ("latents", "known")}
      alone |= {"mask": batch["mask"][row, pixels][None], "ok": batch["ok"][row, k][None]}
      yield 3 * row + k, alone | {name: batch[name][row, k][None] for name in ("text", "image")}


@functools.cache
def one_by_one(folder):
  """Loss and gradients of all clips, each in a row of its own, on one device, added up."""
  method = method_of(meshes.build())
  slope = jax.jit(jax.value_and_grad(lambda params, batch, samples: step.sums(
    params, method, batch, jnp.int32(NOW), samples), has_aux=True))
  found = [slope(parameters(), clip, np.array([number])) for number, clip in apart(packed_batch(folder))]
  (total, count), grads = jax.tree.map(lambda *leaves: sum(map(np.float64, leaves)), *found)
  assert count > 6
  return total / count, jax.tree.map(lambda leaf: leaf / count, grads)


ONE, EIGHT = {}, {"data": 2, "seq": 2, "clip": 2}


@pytest.mark.parametrize(("sizes", "kernel", "parts"), [
  (ONE, "dense", 1), (EIGHT, "dense", 1), ({"fsdp": 2, "seq": 4}, "blockwise", 2)])
def test_clips_that_share_rows_teach_what_each_teaches_alone(folder, sizes, kernel, parts):
  mesh = meshes.build(sizes) if sizes else meshes.build()
  method = method_of(mesh, kernel, micro_batches=parts)
  placed = placement.shardings([*wan_placement.RULES, *wan_placement.IMAGE_RULES], parameters(), mesh)
  params = jax.tree.map(jax.device_put, parameters(), placed)
  batch = meshes.to_devices(mesh, packed_batch(folder))
  grads, loss = jax.jit(functools.partial(step.gradients, method))(
    params, batch, jnp.int32(NOW))
  wanted, slopes = one_by_one(folder)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  for leaf, want in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
    np.testing.assert_allclose(leaf, want, rtol=0, atol=1e-4 * abs(want).max())
    assert abs(want).max() > 0


def test_no_clip_of_a_row_sees_another(folder):
  """The errors of one clip have exactly no slope on anything of the others, and do not change with it by a bit."""
  batch, params = (jax.tree.map(jnp.asarray, tree) for tree in (packed_batch(folder), parameters()))
  method = method_of(meshes.build(EIGHT))
  row = next(row for row, of in enumerate(batch["segment"]) if of.max() == 1)

  def errors(told):
    it = step.lesson(replace(method, drop_text=0.0), {**batch, **told}, NOW, jnp.arange(12).reshape(4, 3),
                     lambda purpose: keys.key(5, NOW, purpose))
    x = path.noisy(it.clean, it.noise, it.t)
    return jnp.square(method.velocity(params, x, it.t, it.given, it.text)).sum((2, 3, 4))

  told = {name: batch[name] for name in ("text", "image", "latents", "known")}
  first = batch["segment"][row] == 0
  slope = jax.jit(jax.grad(lambda told: (errors(told)[row] * first).sum()))(told)
  for name in ("text", "image"):
    assert (slope[name][row, 0] != 0).any()
    assert (np.delete(slope[name][row], 0, 0) == 0).all()
  for name in ("latents", "known"):
    assert (np.asarray(slope[name])[row, first] != 0).any() and (np.asarray(slope[name])[row, ~first] == 0).all()
  assert all((np.delete(leaf, row, 0) == 0).all() for leaf in slope.values())
  run = jax.jit(errors)
  changed = run(told | {"text": told["text"].at[row, 1].add(1.0), "latents": told["latents"].at[row, ~first].add(1.0)})
  assert (changed[row, first] == run(told)[row, first]).all()
  assert (changed[row, batch["segment"][row] == 1] != run(told)[row, batch["segment"][row] == 1]).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_noise_and_times_of_a_clip_are_those_of_a_draw_of_its_length(pattern):
  """Whatever the rows: so the law of the times is the same, and a clip draws the same in any row."""
  draw, streams = TimeDraw(per_frame=0.5, pattern=pattern, block=2), keys.per_sample(keys.key(0, 0, "time"),
                                                                                    jnp.arange(64))
  lengths = jnp.array([1, 4, 7, 9])[jnp.arange(64) % 4]
  run = jax.jit(draw, static_argnums=1)
  found = run(streams, 9, 0, lengths)
  for length in (1, 4, 7, 9):
    of = np.flatnonzero(lengths == length)
    np.testing.assert_array_equal(found[of, :length], run(streams[of], length, 0))
  long, short = (jax.random.normal(jax.random.key(1), (f, 4, 6, 3)) for f in (9, 4))
  np.testing.assert_array_equal(long[:4], short)


def test_the_held_out_loss_of_rows_is_that_of_their_clips(folder):
  method, batch = replace(method_of(meshes.build()), drop_text=0.0), packed_batch(folder)
  measure = jax.jit(step.make_held_out(method))
  together = measure(parameters(), batch, 1)
  assert together.shape == (step.BINS,) and np.isfinite(together).all()
  full = {**batch, "segment": np.where(batch["segment"] == 1, -1, batch["segment"])}  # without the second clips
  fewer = measure(parameters(), full, 1)
  assert (fewer != together).all()
