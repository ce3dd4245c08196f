"""The training step against plain loops, closed forms and itself cut in other ways; and the keys it draws from.

The network is a toy of a few parameters: what is proved here holds for any.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anisora_jax import keys
from anisora_jax.diffusion import objective
from anisora_jax.diffusion.times import TimeDraw
from anisora_jax.errors import BadInput
from anisora_jax.models.pixels import Pixels
from anisora_jax.tasks.conditions import condition
from anisora_jax.tasks.masks import TASKS, Mixture
from anisora_jax.training import optimizer, state, step

BATCH, FRAMES, HEIGHT, WIDTH = 8, 5, 6, 8  # pixels
VARIANCE = (256**2 - 1) / 12 / 127.5**2  # of a pixel that takes each of its 256 values as often


# Compiled with little optimisation, which is four times as fast; results are rounded in another way, no more.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PIXELS = Pixels(spatial=2, temporal=1)


def velocity(params, x, t, given, text):
  """Reads all it is given, each frame also the one before; what it says of frozen frames and held cells is its own."""
  seen = jnp.concatenate([x, given.channels()], -1)
  v = jnp.tanh(jnp.einsum("bfhwg,gc->bfhwc", seen + 0.5 * jnp.roll(seen, 1, 1), params["mix"]))
  v += t[..., None, None, None] * params["time"] + jnp.sqrt(params["root"])
  v += (text @ params["text"]).mean(1)[:, None, None, None]
  return v + params["frozen"] * given.frozen[..., None, None, None] + params["held"] * given.held


def parameters(codec=PIXELS, seed=0):
  numbers, c = np.random.default_rng(seed), codec.channels
  mix, time, text = (numbers.normal(0, 0.2, shape) for shape in [(2 * c + codec.temporal, c), (c,), (4, c)])
  found = {"mix": mix, "time": time, "text": text, "root": 0.04, "frozen": 0.5, "held": -0.7}
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


def batch_of(size=BATCH, seed=0, frames=FRAMES, height=HEIGHT, width=WIDTH):
  numbers, shape = np.random.default_rng(seed), (frames, height, width)
  # Sample by sample, so that a small batch is the beginning of a large one.
  samples = [{"frames": numbers.integers(0, 256, (*shape, 3), np.uint8),
              "character": numbers.uniform(size=shape) < 0.05,
              "text": numbers.normal(size=(3, 4)).astype(np.float32),
              "ok": np.float32(1)} for _ in range(size)]
  return {name: jnp.asarray(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def few(**changes):
  """A method of few tasks, which compiles fast."""
  tasks = Mixture({"none": 1.0, "first": 1.0, "every_nth": 1.0, "box": 1.0})
  times = TimeDraw(per_frame=0.5, shift=3.0)
  return replace(step.Method(velocity, PIXELS, tasks, times, weight="bell", seed=7), **changes)


FEW, NOW = few(), 3


@functools.cache
def gradients(micro_batches=1):
  """Compiled (params, batch) -> gradients, loss at one step."""
  method = replace(FEW, micro_batches=micro_batches)
  return jit(lambda params, batch: step.gradients(method, params, batch, jnp.int32(NOW)))


def draw(method):
  return jit(lambda batch, samples: step.lesson(method, batch, NOW, samples,
                                                    lambda purpose: keys.key(method.seed, NOW, purpose)))


LESSON = draw(FEW)


def pairs(one, other):
  return [tuple(map(np.asarray, pair)) for pair in zip(*map(jax.tree.leaves, (one, other)), strict=True)]


def assert_same(found, expected):
  for a, b in pairs(found, expected):
    np.testing.assert_array_equal(a, b)


def assert_close(found, expected, tolerance):
  """Each leaf within `tolerance` of its largest number."""
  for a, b in pairs(found, expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


def differs(one, other):
  return any((a != b).any() for a, b in pairs(one, other))


@pytest.mark.parametrize("wrong, line", [
  ({"drop_text": 2.0}, "drop_text = 2.0 is no share: take 0 .. 1."),
  ({"drop_condition": -1.0}, "drop_condition = -1.0 is no share: take 0 .. 1."),
  ({"drop_condition": float("nan")}, "drop_condition = nan is no share: take 0 .. 1."),
  ({"given": 3.0}, "given = 3.0 is no share: take 0 .. 1."),
  ({"micro_batches": 0}, "micro_batches = 0: take 1 or more."),
  ({"micro_batches": -1}, "micro_batches = -1: take 1 or more."),
])
def test_a_wrong_method_is_told_in_one_line(wrong, line):
  with pytest.raises(BadInput) as told:
    few(**wrong)
  assert str(told.value) == line


# Loss and gradients of a batch


@pytest.mark.parametrize("ok", [[1] * 8, [1, 0, 1, 1, 0, 0, 1, 1]])
def test_the_loss_is_that_of_a_loop_over_the_frames_drawn(ok):
  params, batch = parameters(), batch_of() | {"ok": np.array(ok, np.float32)}
  it = LESSON(batch, np.arange(BATCH))
  clean, noise, t = (np.asarray(x, np.float64) for x in (it.clean, it.noise, it.t))
  held, weights = np.asarray(it.given.held[..., 0]), objective.weight(it.t, FEW.weight, FEW.times)
  at = t[..., None, None, None]
  said = jit(velocity)(params, ((1 - at) * clean + at * noise).astype(np.float32), it.t, it.given, it.text)
  total, count = 0.0, 0
  for b, f in np.ndindex(BATCH, FRAMES):
    hidden = ~held[b, f]
    if ok[b] and hidden.any():
      error = (np.asarray(said, np.float64)[b, f] - (noise - clean)[b, f]) ** 2
      total, count = total + float(weights[b, f]) * error[hidden].mean(), count + 1
  assert 0 < count < BATCH * FRAMES
  np.testing.assert_allclose(gradients()(params, batch)[1], total / count, rtol=1e-6)


@pytest.mark.parametrize("ok", [[1] * 8, [1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1, 0], [0] * 8])
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_add_up_to_one_large_batch(micro_batches, ok):
  batch = batch_of() | {"ok": np.array(ok, np.float32)}
  found = gradients(micro_batches)(parameters(), batch)
  assert_close(found, gradients()(parameters(), batch), 1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))  # with no clip that could be read, too


def test_a_sample_draws_the_same_in_a_small_batch_and_in_any_place_of_one():
  whole, numbers = LESSON(batch_of(), np.arange(BATCH)), np.arange(BATCH)
  part = LESSON(batch_of(4), numbers[:4])
  assert_same(part, jax.tree.map(lambda x: x[:4], whole))
  turned = LESSON({name: x[::-1] for name, x in batch_of().items()}, numbers[::-1])
  assert_same(turned, jax.tree.map(lambda x: x[::-1], whole))


def test_an_unread_sample_has_no_influence():
  params, batch = parameters(), batch_of() | {"ok": np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32)}
  found = gradients()(params, batch)
  other = batch_of(seed=1)
  mixed = {name: np.concatenate([batch[name][:4], other[name][4:]]) for name in ("frames", "character", "text")}
  assert_same(gradients()(params, batch | mixed), found)
  assert differs(gradients()(params, batch_of()), found)
  assert_close(gradients()(params, batch_of(4)), found, 1e-6)


def test_what_is_said_of_given_frames_and_cells_is_not_in_the_loss():
  given = LESSON(batch_of(), np.arange(BATCH)).given
  assert given.frozen.any() and (np.asarray(given.held.any((2, 3, 4))) & ~np.asarray(given.frozen)).any()
  slopes, _ = gradients()(parameters(), batch_of())
  assert slopes["frozen"] == 0 and slopes["held"] == 0
  assert all((np.asarray(slopes[name]) != 0).any() for name in ("mix", "time", "text", "root"))


def test_given_frames_are_clean_at_time_zero():
  it = LESSON(batch_of(), np.arange(BATCH))
  frozen = np.asarray(it.given.frozen)
  assert (np.asarray(it.t)[frozen] == 0).all() and (np.asarray(it.t)[~frozen] > 0).all()


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_given_frames_may_keep_a_share_of_their_noise_and_then_count_like_the_others(share):
  clean, it = (draw(few(given=given))(batch_of(), np.arange(BATCH)) for given in (0.0, share))
  frozen = np.asarray(clean.given.frozen)
  assert frozen.any() and not np.asarray(it.given.frozen).any() and not np.asarray(it.given.held).any()
  np.testing.assert_array_equal(np.asarray(it.t)[~frozen], np.asarray(clean.t)[~frozen])
  together = np.asarray(it.t / it.share)  # the time that a frame would have were it not given
  np.testing.assert_allclose(np.asarray(it.t)[frozen], share * together[frozen], rtol=1e-6)
  assert (np.asarray(it.t)[frozen] > 0).all()
  np.testing.assert_array_equal(it.given.mask, clean.given.mask)  # it is still told what is given
  params = parameters()
  slopes, _ = jit(lambda params, batch: step.gradients(few(given=share), params, batch, jnp.int32(NOW)))(
    params, batch_of())
  assert slopes["frozen"] == 0  # the toy says it of frozen frames alone, and there are none
  found, counted = step.errors(few(given=share), params, it)
  assert np.asarray(counted).all() and (np.asarray(found) > 0).all()


def test_a_dropped_caption_is_the_blank_one():
  blank = jnp.arange(12.0).reshape(3, 4)
  it = draw(few(drop_text=0.5, blank=blank))(batch_of(), np.arange(BATCH))
  dropped = (np.asarray(it.text) == np.asarray(blank)).all((1, 2))
  assert 0 < dropped.sum() < BATCH
  np.testing.assert_array_equal(np.asarray(it.text)[~dropped], batch_of()["text"][~dropped])


def test_frames_span_minus_one_to_one():
  found = step.unit(jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3, 1).repeat(3, -1))
  np.testing.assert_allclose(found[0, 0, 0, :, 0], [-1, -0.6, 1], atol=1e-7)
  assert found[0, 0, 0, 0, 0] == -1 and found[0, 0, 0, 2, 0] == 1


def test_no_hidden_pixel_reaches_the_loss_through_the_condition():
  codec, size = Pixels(spatial=2, temporal=4), 24
  method = few(codec=codec, tasks=Mixture(dict.fromkeys(TASKS, 1.0)))
  batch = batch_of(size, frames=9)
  it = draw(method)(batch, np.arange(size))
  places = [divmod(frame + 3, 4) for frame in range(9)]
  mask = np.stack([np.asarray(it.given.mask)[:, f, ..., channel] > 0 for f, channel in places], 1)
  assert len({of_sample.tobytes() for of_sample in mask}) > 12

  def given_of(frames):
    return condition(frames, jnp.asarray(mask), codec.encode, 4)

  @jit
  @jax.grad
  def slope(frames):
    given = given_of(frames)
    errors, counted = step.errors(method, parameters(codec), it.replace(given=given))
    return (errors * counted).sum()

  frames = step.unit(batch["frames"])
  assert_close(it.given, given_of(frames), 1e-6)  # what a step shows is what is followed here
  found = np.asarray(slope(frames))
  given = np.broadcast_to(mask.repeat(2, 2).repeat(2, 3)[..., None], found.shape)
  assert (found[~given] == 0).all() and (found[given] != 0).any()


# Captions and conditions are dropped


def test_captions_and_conditions_are_dropped_as_often_as_asked_and_apart():
  size = 4000
  method = few(tasks=Mixture({"last": 1.0}), drop_text=0.3, drop_condition=0.2)
  it = draw(method)(batch_of(size, frames=2, height=2, width=2), np.arange(size))
  text = np.asarray(it.text != 0).any((1, 2))
  given = np.asarray(it.given.mask).any((1, 2, 3, 4))
  for happened, p in [(text, 0.7), (given, 0.8), (text & given, 0.56)]:
    assert abs(happened.mean() - p) < 4 * np.sqrt(p * (1 - p) / size)
  np.testing.assert_array_equal(it.given.frozen, np.stack([np.zeros(size, bool), given], 1))


def test_what_is_always_dropped_never_matters():
  def loss(**changes):
    method = few(**changes)
    return jit(lambda batch: step.sums(parameters(), method, batch, jnp.int32(NOW), jnp.arange(BATCH)))

  batch, other = batch_of(), batch_of() | {"text": batch_of(seed=1)["text"]}
  blank = loss(drop_text=1.0, drop_condition=1.0)
  assert_same(blank(batch), blank(other))
  nothing = loss(drop_text=1.0, drop_condition=0.0, tasks=Mixture({"none": 1.0}))
  assert_close(blank(batch), nothing(batch), 1e-6)
  assert differs(gradients()(parameters(), batch)[1], gradients()(parameters(), other)[1])  # kept, it does


# The step


OPTIMIZER, _ = optimizer.build(optimizer.Optimizer(rate=1e-2, warmup=2, clip=0.5), parameters())


@jit
def one_step(now, batch):
  return step.make_step(FEW, OPTIMIZER, optimizer.ema)(now, batch)


def begin(at=0, **changes):
  return state.create(parameters() | changes, OPTIMIZER).replace(step=jnp.int32(at))


def full(**changes):
  return batch_of() | {"stop": np.zeros(BATCH, np.int32)} | changes


def without_step(now):
  return now.params, now.ema, now.opt


def test_a_step_is_the_optimisers_update_of_the_gradients():
  now = begin(NOW)
  ok = np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)
  found, measures = one_step(now, full(ok=ok))
  slopes, loss = gradients()(now.params, batch_of() | {"ok": ok})
  changes, opt = jit(OPTIMIZER.update)(slopes, now.opt, now.params)
  params = optax.apply_updates(now.params, changes)
  assert_close((found.params, found.opt), (params, opt), 1e-5)
  decay = (1 + NOW) / (10 + NOW)
  assert_close(found.ema, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, now.ema, params), 1e-5)
  assert found.step == NOW + 1 and differs(found.params, now.params)
  np.testing.assert_allclose(measures["loss"], loss, rtol=1e-5)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(slopes)))
  np.testing.assert_allclose(measures["grad_norm"], norm, rtol=1e-5)
  assert measures["skipped"] == 0 and measures["unread"] == 2 and measures["stop"] == 0


def test_a_step_draws_by_its_number_and_by_nothing_else():
  first, again, later = one_step(begin(4), full()), one_step(begin(4), full()), one_step(begin(5), full())
  assert_same(again, first)
  assert differs(later[1]["loss"], first[1]["loss"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(what):
  now, _ = one_step(begin(), full())
  if what == "loss":
    bad = full(text=np.full_like(batch_of()["text"], np.inf))
  else:  # the slope of a root is infinite at 0
    now, bad = now.replace(params=now.params | {"root": jnp.float32(0)}), full()
  found, measures = one_step(now, bad)
  assert np.isfinite(measures["loss"]) == (what == "gradient") and not np.isfinite(measures["grad_norm"])
  assert_same(without_step(found), without_step(now))
  assert found.step == now.step + 1 and measures["skipped"] == 1
  good = without_step(one_step(found.replace(params=found.params | {"root": jnp.float32(0.04)}), full())[0])
  assert differs(good, without_step(found)) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))


def test_any_host_that_wishes_to_stop_is_heard():
  for wishes in ([0, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1] * 8):
    assert one_step(begin(), full(stop=np.array(wishes, np.int32)))[1]["stop"] == 1


# Held-out loss


@functools.cache
def held_out():
  def skilled(params, x, t, given, text):
    """params["skill"] of the best a frame by itself can say, or its mean time at all frames."""
    at = t[..., None, None, None]
    best = (at - (1 - at) * VARIANCE) / (at**2 + (1 - at) ** 2 * VARIANCE)
    return params["skill"] * best * x + params["time"] * t.mean(1)[:, None, None, None, None]

  return jit(step.make_held_out(few(velocity=skilled, tasks=Mixture({"first": 1.0}), drop_condition=0.0)))


def test_held_out_loss_is_the_expected_one_at_the_middle_of_each_bin():
  batch = batch_of(16)
  numbers = 16 * (FRAMES - 1) * HEIGHT * WIDTH * 3
  t, plain = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), 1 + VARIANCE
  best = plain - (t - (1 - t) * VARIANCE) ** 2 / (t**2 + (1 - t) ** 2 * VARIANCE)
  told = plain + (t * (FRAMES - 1) / FRAMES) ** 2  # the first frame is given, at time 0
  # A square of a number of variance s has variance 2 s^2 where the number is normal, less where it is uniform.
  for skill, time, expected in [(0.0, 0.0, 0 * t + plain), (1.0, 0.0, best), (0.0, 1.0, told)]:
    found = held_out()({"skill": skill, "time": time}, batch, 0)
    assert found.shape == (step.BINS,)
    assert (abs(found - expected) < 4 * np.sqrt(2 / numbers) * expected).all()


def test_held_out_loss_moves_with_the_model_alone_and_falls_with_skill():
  found = {skill: np.asarray(held_out()({"skill": skill, "time": 0.0}, batch_of(16), 0)) for skill in (0.0, 0.5, 1.0)}
  assert (found[1.0] < found[0.5]).all() and (found[0.5] < found[0.0]).all()
  assert_same(held_out()({"skill": 0.5, "time": 0.0}, batch_of(16), 0), found[0.5])
  assert differs(held_out()({"skill": 0.5, "time": 0.0}, batch_of(16), 1), found[0.5])


# Precision


def test_a_master_in_f32_drifts_as_a_run_all_in_f32():
  chain, _ = optimizer.build(optimizer.Optimizer(rate=1e-5), parameters())
  begun = state.create(jax.tree.map(lambda x: 0.1 * x, parameters()), chain)  # a deviation of 0.02, as weights have
  batch = full()

  @jit
  def drift(bf16_compute, bf16_master):
    def rounded(tree):
      return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    def mixed(params, x, t, given, text):
      small = velocity(*rounded((params, x, t)), given, rounded(text)).astype(jnp.float32)
      return jnp.where(bf16_compute, small, velocity(params, x, t, given, text))

    update = step.make_step(few(velocity=mixed, tasks=Mixture({"first": 1.0})), chain, optimizer.ema)

    def kept(now, _):
      now, _ = update(now, batch)
      params = jax.tree.map(lambda leaf, low: jnp.where(bf16_master, low, leaf), now.params, rounded(now.params))
      return now.replace(params=params), None

    ended, _ = jax.lax.scan(kept, begun, length=100)
    return jnp.linalg.norm(ended.params["mix"] - begun.params["mix"])

  exact = drift(False, False)
  assert abs(drift(True, False) / exact - 1) < 0.02
  assert abs(drift(True, True) / exact - 1) > 0.02  # a master in bf16 loses or inflates its small updates


# Keys


def test_purposes_keep_their_numbers():
  golden = {"init": 0, "task": 1, "time": 2, "noise": 3, "drop": 4, "heldout": 5, "sample": 6}
  assert {name: keys.PURPOSES[name] for name in golden} == golden
  assert sorted(keys.PURPOSES.values()) == list(range(len(keys.PURPOSES)))
  assert jax.random.key_data(keys.key(1, 2, "time")).tolist() == [2353047524, 855645856]
  with pytest.raises(KeyError):
    keys.key(1, 2, "weather")


def test_streams_differ_by_seed_step_purpose_and_sample():
  seen = [row.tobytes() for seed in (0, 1, 2) for now in (0, 1, 2) for purpose in keys.PURPOSES
          for row in np.asarray(jax.random.key_data(keys.per_sample(keys.key(seed, now, purpose), jnp.arange(5))))]
  assert len(set(seen)) == len(seen) == 3 * 3 * len(keys.PURPOSES) * 5
