"""What each task gives, what the network may see of it, and the codec and words of the small configs.

Witnesses: golden tables, numpy loops, the statistics of many draws (bounds of 4 sigma), gradients.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import measure

from anisora_jax import keys
from anisora_jax.errors import BadInput
from anisora_jax.models.codec import latent_shape
from anisora_jax.models.pixels import Pixels
from anisora_jax.models.words import Words
from anisora_jax.tasks import conditions, masks
from anisora_jax.tasks.masks import Mixture

# Compiled with little optimisation, which is four times as fast; results are rounded in another way, no more.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SAMPLES, FRAMES = 512, 33
H, W = 6, 24  # latent rows and columns: so wide that three discs never cover half of it
STRIDE = pytest.mark.parametrize("stride", [1, 4])
REGIONS = ["box", "blob", "character"]  # they know nothing of the codec's stride


def stream(count, purpose="task"):
  return keys.per_sample(keys.key(5, 0, purpose), jnp.arange(count))


@functools.cache
def characters():
  """A box that walks, in the even samples; it is away from the last frame."""
  numbers, found = np.random.default_rng(0), np.zeros((SAMPLES, FRAMES, H, W), bool)
  for sample in range(0, SAMPLES, 2):
    row, column, speed = numbers.integers(0, H), numbers.integers(0, W), numbers.integers(-2, 3)
    for frame in range(FRAMES - 1):
      left = (column + speed * frame) % W
      found[sample, frame, row:row + 2, left:left + 3] = True
  return found


@functools.cache
def drawn(stride):
  """Many masks of every task, compiled at once: name -> [samples, F, h, w]."""
  def of(task):
    return jax.vmap(lambda key, character: task(key, masks.Scene(character, stride)))

  tasks = {name: task for name, task in masks.TASKS.items() if stride == 4 or name not in REGIONS}
  every = jit(lambda keys, character: {name: of(task)(keys, character) for name, task in tasks.items()})
  return {name: np.asarray(mask) for name, mask in every(stream(SAMPLES), jnp.asarray(characters())).items()}


def frames_of(mask):
  """Which frames are given [samples, F], each whole or not at all."""
  assert (mask.all((2, 3)) == mask.any((2, 3))).all()
  return mask.all((2, 3))


def assert_share(happened, p):
  happened = np.asarray(happened)
  assert abs(happened.mean() - p) <= 4 * np.sqrt(p * (1 - p) / len(happened))


# Tasks


@STRIDE
@pytest.mark.parametrize("name, given", [
  ("none", []), ("first", [0]), ("last", [-1]), ("first_last", [0, -1]), ("loop", [0, -1])])
def test_a_task_of_fixed_frames_gives_them_and_no_other(name, given, stride):
  expected = np.zeros(FRAMES, bool)
  expected[given] = True
  assert (frames_of(drawn(stride)[name]) == expected).all()


@STRIDE
def test_keyframes_are_one_to_five_anywhere_on_the_ends_of_latent_frames(stride):
  given = frames_of(drawn(stride)["keyframes"])
  assert not np.delete(given, np.arange(0, FRAMES, stride), axis=1).any()
  count = given.sum(1)
  assert count.min() == 1 and count.max() == 5
  for number in range(1, 6):
    assert_share(count == number, 1 / 5)
  for frame in range(0, FRAMES, stride):
    assert_share(given[:, frame], 3 / (1 + 32 // stride))  # three of the latent frames on average


@STRIDE
def test_every_nth_frame_from_the_first_with_n_from_two_to_eight(stride):
  given, found = frames_of(drawn(stride)["every_nth"]), []
  for row in given:
    n = np.flatnonzero(row)[1]
    assert (row == (np.arange(len(row)) % n == 0)).all()
    found.append(n)
  for n in range(2, 9):
    assert_share(np.array(found) == n, 1 / 7)


@STRIDE
def test_a_continuation_gives_two_to_half_of_the_latent_frames(stride):
  given = drawn(stride)["continuation"]
  lengths = frames_of(given).sum(1)
  assert all(row[:length].all() for row, length in zip(given, lengths, strict=True))
  assert set(lengths) == set(range(1 + stride, FRAMES // 2 + 1, stride))
  packed = np.asarray(conditions.pack(jnp.asarray(given[:8]), stride))
  assert set(np.unique(packed.mean((2, 3, 4)))) == {0, 1}  # latent frames are given whole


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_task_gives_the_first_frame_and_something_to_do(name):
  given = drawn(4)[name]
  assert given[:, 0].all()
  assert not given[:, 1:].all((1, 2, 3)).any() and given[:, 1:].any((1, 2, 3)).all()


def test_a_box_has_sides_of_a_quarter_to_three_quarters_and_is_kept_or_regenerated():
  given = drawn(4)["box"]
  assert (given[:, 1:] == given[:, 1:2]).all()
  kept = np.array([is_box(mask) for mask in given[:, 1]])  # what lies around a box is never one
  assert_share(kept, 1 / 2)
  inside = np.where(kept[:, None, None], given[:, 1], ~given[:, 1])
  assert all(is_box(mask) for mask in inside)
  heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
  assert set(heights) == {2, 3, 4} and widths.min() == 6 and widths.max() == 18


def is_box(mask):
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_a_box_leaves_something_to_do_on_the_smallest_canvas():
  box = jit(jax.vmap(lambda key: masks._box(key, masks.Scene(jnp.zeros((3, 2, 2), bool), 1))))(stream(64))
  assert (np.asarray(box).sum((1, 2, 3)) == 1).all()


def test_a_blob_is_one_to_three_discs_and_is_kept_or_regenerated():
  given = drawn(4)["blob"]
  assert (given[:, 1:] == given[:, 1:2]).all()
  kept = given[:, 1].mean((1, 2)) < 0.5
  assert_share(kept, 1 / 2)
  assert np.where(kept[:, None, None], given[:, 1], ~given[:, 1]).any(0).all()  # they may lie anywhere
  pieces = [measure.label(mask if keep else ~mask, connectivity=2).max()
            for mask, keep in zip(given[:, 1], kept, strict=True)]
  assert set(pieces) == {1, 2, 3}


def test_the_character_region_is_the_character_and_a_margin_of_one_cell():
  given, kept = drawn(4)["character"][::2], []
  for mask, character in zip(given, characters()[::2], strict=True):
    expected = np.zeros_like(character)
    for frame, row, column in np.argwhere(character):
      expected[frame, max(row - 1, 0):row + 2, max(column - 1, 0):column + 2] = True
    kept.append((mask[1:] == expected[1:]).all())
    assert kept[-1] or (mask[1:] == ~expected[1:]).all()
  assert_share(kept, 1 / 2)


def test_a_clip_without_a_character_gets_a_blob():
  given = drawn(4)["character"][1::2]
  assert (given[:, 1:] == given[:, 1:2]).all()
  kept = given[:, 1].mean((1, 2)) < 0.5
  assert_share(kept, 1 / 2)
  assert all(1 <= measure.label(mask if keep else ~mask, connectivity=2).max() <= 3
             for mask, keep in zip(given[:, 1], kept, strict=True))


def test_cells_with_a_pixel_of_the_character_are_touched():
  character = np.random.default_rng(1).uniform(size=(2, 3, 8, 12)) < 0.05
  found = conditions.cells_touched(jnp.asarray(character), 4)
  for b, f, h, w in np.ndindex(2, 3, 2, 3):
    assert found[b, f, h, w] == character[b, f, 4 * h:4 * h + 4, 4 * w:4 * w + 4].any()


# Mixture


def test_one_compiled_mixture_draws_each_task_as_often_as_it_weighs():
  mixture, compiled = Mixture({"none": 1.0, "first": 2.5, "box": 0.0, "last": 0.5, "first_last": 4.0}), []
  count = 20_000

  @jit
  def draw(keys):
    compiled.append(1)
    return mixture(keys, jnp.zeros((count, 3, 1, 1), bool), 1)[:, :, 0, 0]

  given = np.asarray(draw(stream(count)))
  other = np.asarray(draw(stream(count, "drop")))
  assert len(compiled) == 1 and (given != other).any()
  for pattern, weight in [((0, 0, 0), 1), ((1, 0, 0), 2.5), ((0, 0, 1), 0.5), ((1, 0, 1), 4)]:
    assert_share((given == np.array(pattern, bool)).all(1), weight / 8)


def test_a_sample_draws_the_same_task_whatever_its_batch_mates():
  mixture = Mixture({"first": 1.0, "keyframes": 2.0, "box": 1.0})
  of = jit(lambda numbers, character: mixture(keys.per_sample(keys.key(5, 0, "task"), numbers), character, 1))
  numbers, character = np.arange(32), characters()[:32]
  order = np.random.default_rng(2).permutation(32)
  whole, mixed = of(numbers, character), of(numbers[order], character[order])
  np.testing.assert_array_equal(mixed, np.asarray(whole)[order])
  assert len({mask.tobytes() for mask in np.asarray(whole)}) > 12


@pytest.mark.parametrize("weights, line", [
  ({"first": 1.0, "first_lats": 1.0}, "no task is named 'first_lats': did you mean 'first_last'?"),
  ({"first": -1.0}, "task 'first' has weight -1.0: take 0 or more."),
  ({"first": float("nan")}, "task 'first' has weight nan: take 0 or more."),
  ({"first": 0.0, "box": 0.0}, "all task weights are 0: give one of none, first, last, first_last, loop, keyframes, "
                             "every_nth, continuation, box, blob, character a positive weight."),
])
def test_a_wrong_mixture_is_told_in_one_line(weights, line):
  with pytest.raises(BadInput) as told:
    Mixture(weights)
  assert str(told.value) == line


# Conditions


@pytest.mark.parametrize("frame, latent, channels", [
  (0, 0, [0, 1, 2, 3]), (1, 1, [0]), (4, 1, [3]), (8, 2, [3]), (16, 4, [3]), (24, 6, [3]), (80, 20, [3])])
def test_masks_are_packed_as_in_wan(frame, latent, channels):
  mask = np.zeros((1, 81, 2, 3), bool)
  mask[:, frame] = True
  packed = np.asarray(conditions.pack(jnp.asarray(mask), 4))
  assert packed.shape == (1, 21, 2, 3, 4) and packed.dtype == np.float32
  expected = np.zeros_like(packed)
  expected[:, latent, :, :, channels] = 1
  np.testing.assert_array_equal(packed, expected)


def test_any_mask_is_packed_cell_by_cell():
  mask = np.random.default_rng(0).uniform(size=(2, 17, 2, 3)) < 0.5
  for stride in (1, 2, 4, 8):
    packed = conditions.pack(jnp.asarray(mask), stride)
    assert packed.shape == (2, 1 + 16 // stride, 2, 3, stride)
    np.testing.assert_array_equal(packed[:, 0], np.repeat(mask[:, 0, ..., None], stride, -1))
    for frame in range(1, 17):
      latent, channel = divmod(frame + stride - 1, stride)
      np.testing.assert_array_equal(packed[:, latent, ..., channel], mask[:, frame])


def test_held_cells_are_given_in_every_frame_they_cover_and_frozen_frames_in_every_cell():
  numbers, codec = np.random.default_rng(0), Pixels(spatial=2, temporal=4)
  mask = numbers.uniform(size=(6, 9, 2, 2)) < 0.8
  mask[:3, 1:5] = True
  mask[0, 0], mask[1, 5:], mask[2, 2, 1, 0] = True, True, False
  found = conditions.condition(jnp.zeros((6, 9, 4, 4, 3)), jnp.asarray(mask), codec.encode, 4)
  covered = [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
  held = np.stack([mask[:, frames].all(1) for frames in covered], 1)
  np.testing.assert_array_equal(found.held[..., 0], held)
  frozen = held.all((2, 3))
  np.testing.assert_array_equal(found.frozen, frozen)
  assert frozen.any() and not frozen.all() and (held.any((2, 3)) & ~frozen).any()


def test_channels_are_the_mask_and_then_latents_of_the_given_pixels_with_grey_elsewhere():
  codec, numbers = Pixels(spatial=2, temporal=4), np.random.default_rng(0)
  frames = numbers.uniform(-1, 1, (2, 9, 4, 6, 3)).astype(np.float32)
  mask = numbers.uniform(size=(2, 9, 2, 3)) < 0.5
  shown = frames.copy()
  for b, f, y, x in np.ndindex(2, 9, 4, 6):
    if not mask[b, f, y // 2, x // 2]:
      shown[b, f, y, x] = 0
  found = conditions.condition(jnp.asarray(frames), jnp.asarray(mask), codec.encode, 4)
  channels = found.channels()
  np.testing.assert_array_equal(channels[..., :4], conditions.pack(jnp.asarray(mask), 4))
  np.testing.assert_array_equal(channels[..., 4:], codec.encode(jnp.asarray(shown)))


@functools.cache
def leaks(stride):
  """(frames, mask) -> channels, and the gradient of a random function of theirs with respect to the frames."""
  codec = Pixels(spatial=2, temporal=stride)
  shape = (4, *latent_shape(codec, FRAMES, 2 * H, 2 * W), stride + codec.channels)
  weights = np.random.default_rng(3).normal(size=shape).astype(np.float32)

  def channels(frames, mask):
    return conditions.condition(frames, mask, codec.encode, stride).channels()

  def number(frames, mask):
    return jnp.sum(weights * jnp.tanh(channels(frames, mask) + weights))

  return jit(channels), jit(jax.grad(number))


@STRIDE
@pytest.mark.parametrize("name", masks.TASKS)
def test_nothing_hidden_reaches_the_channels(name, stride):
  numbers = np.random.default_rng(4)
  frames, others = numbers.uniform(-1, 1, (2, 4, FRAMES, 2 * H, 2 * W, 3)).astype(np.float32)
  mask = drawn(4)[name][:4]
  given = mask.repeat(2, 2).repeat(2, 3)[..., None]
  of, slope = leaks(stride)
  found = np.asarray(slope(frames, mask))
  assert (found[~np.broadcast_to(given, found.shape)] == 0).all()
  assert (found != 0).sum() >= 0.9 * 12 * mask.sum()  # and what is given does: 2 x 2 pixels of 3 colours a cell
  np.testing.assert_array_equal(of(frames, mask), of(np.where(given, frames, others), mask))


def test_an_image_encoder_sees_the_first_whole_frame_or_both_ends_and_nothing_hidden():
  frames = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 9, 4, 6, 3)), jnp.float32)
  mask = np.zeros((3, 9, 2, 3), bool)
  mask[0, [4, 8]] = True                 # the picture at 4, not that at 8
  mask[1, 2:, :, 1:] = mask[1, 7] = True  # a region, and frame 7
  mask[2, 0, :1] = True                  # a part of frame 0 alone
  one, two = (np.asarray(conditions.pictures(frames, jnp.asarray(mask), count)) for count in (1, 2))
  np.testing.assert_array_equal(one[:2, 0], np.stack([frames[0, 4], frames[1, 7]]))
  half = np.asarray(frames[2, 0]).copy()
  half[2:] = 0
  np.testing.assert_array_equal(one[2, 0], half)
  np.testing.assert_array_equal(two[0], np.stack([np.zeros((4, 6, 3)), frames[0, 8]]))
  asked = np.asarray(conditions.pictures(frames, jnp.asarray(mask), 1, jnp.array([8, 7, 0])))
  np.testing.assert_array_equal(asked[:, 0], np.stack([frames[0, 8], frames[1, 7], half]))



# Codec and words


@pytest.mark.parametrize("wrong, line", [
  ({"scale": 0.0}, "codec.scale is 0.0: it must be above 0."),
  ({"scale": float("nan")}, "codec.scale is nan: it must be above 0."),
  ({"spatial": 0}, "codec.spatial is 0: it must be 1 or more."),
  ({"temporal": -1}, "codec.temporal is -1: it must be 1 or more."),
])
def test_pixels_that_cannot_come_back_are_refused_in_one_line(wrong, line):
  with pytest.raises(BadInput) as told:
    Pixels(**wrong)
  assert str(told.value) == line


@pytest.mark.parametrize("temporal", [1, 4])
@pytest.mark.parametrize("spatial", [1, 2, 4])
def test_decoding_undoes_encoding(spatial, temporal):
  codec = Pixels(spatial, temporal)
  frames = np.random.default_rng(0).uniform(-1, 1, (2, 9, 8, 12, 3)).astype(np.float32)
  latents = codec.encode(jnp.asarray(frames))
  assert latents.shape == (2, *latent_shape(codec, 9, 8, 12), codec.channels)
  np.testing.assert_array_equal(codec.decode(latents), frames)
  np.testing.assert_array_equal(codec.encode(jnp.zeros((1, 5, 4, 4, 3))), 0)  # grey stands for hidden


def test_a_pixel_frame_lies_where_its_mask_is_packed():
  codec = Pixels(spatial=2, temporal=4)
  for frame in range(9):
    frames, mask = np.zeros((1, 9, 4, 4, 3), np.float32), np.zeros((1, 9, 2, 2), bool)
    frames[:, frame], mask[:, frame] = 1, True
    latents = np.asarray(codec.encode(jnp.asarray(frames))).reshape(1, 3, 2, 2, 4, 12)
    np.testing.assert_array_equal(latents.min(-1), conditions.pack(jnp.asarray(mask), 4))
    np.testing.assert_array_equal(latents.max(-1), latents.min(-1))


@pytest.mark.parametrize("size, line", [
  ((16, 8, 8), "16 frames do not fit a codec of temporal stride 4: take 1 + 4k, for example 13."),
  ((3, 8, 8), "3 frames do not fit a codec of temporal stride 4: take 1 + 4k, for example 1."),
  ((0, 8, 8), "0 frames do not fit a codec of temporal stride 4: take 1 + 4k, for example 1."),
  ((5, 31, 48), "31x48 pixels do not fit a codec of spatial stride 8: take multiples of 8, for example 24x48."),
  ((5, 32, 50), "32x50 pixels do not fit a codec of spatial stride 8: take multiples of 8, for example 32x48."),
  ((5, 0, 8), "0x8 pixels do not fit a codec of spatial stride 8: take multiples of 8, for example 8x8."),
])
def test_a_clip_that_does_not_fit_the_codec_is_told_in_one_line(size, line):
  codec = Pixels(spatial=8, temporal=4)
  with pytest.raises(BadInput) as told:
    latent_shape(codec, *size)
  assert str(told.value) == line
  example = [int(number) for number in re.findall(r"\d+", line.split("example")[1])]
  latent_shape(codec, *([*example, 8, 8] if len(example) == 1 else [5, *example]))  # what is advised is accepted


def test_words_are_the_same_on_every_machine():
  cat = Words(tokens=1, width=8)(["cat"])[0, 0]
  np.testing.assert_allclose(cat[:3], [0.4808105, -0.08632457, -0.5780323], rtol=1e-6)
  many = Words(tokens=600, width=64)([" ".join(f"word{number}" for number in range(600))])[0]
  assert abs(many.mean()) < 4 / np.sqrt(many.size) and abs((many**2).mean() - 1) < 4 * np.sqrt(2 / many.size)


def test_a_caption_is_its_words_in_order_without_case_or_punctuation():
  words = Words(tokens=4, width=16)
  text = words(["A red cat.", " a RED,cat!\n", "cat red a", "a red cat jumps over the fox", "", "?!"])
  assert text.shape == (6, 4, 16) and text.dtype == np.float32
  np.testing.assert_array_equal(text[0], text[1])
  np.testing.assert_array_equal(text[0, :3], text[2, 2::-1])
  np.testing.assert_array_equal(text[0, :3], text[3, :3])
  assert (text[0, 3] == 0).all() and (text[3] != 0).all() and (text[4:] == 0).all()
  assert len(np.unique(text[3, :, 0])) == 4
