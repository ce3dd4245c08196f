"""Path, times and loss against closed forms, plain loops and the statistics of many draws (bounds of 4 sigma)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from anisora_jax import keys
from anisora_jax.diffusion import objective, path, times
from anisora_jax.diffusion.times import TimeDraw
from anisora_jax.errors import BadInput

# Compiled with little optimisation, which is four times as fast; results are rounded in another way, no more.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SAMPLES, FRAMES = 20_000, 6
KOLMOGOROV = 2.28  # sqrt(n) D exceeds this as seldom as a normal number exceeds 4 sigma
SHIFTS = [1.0, 3.0, 5.0, 0.5]
STREAM = keys.per_sample(keys.key(3, 0, "time"), jnp.arange(SAMPLES))
SHAPE = (2, 3, 2, 2, 4)  # b f h w c


def normal(seed, shape=SHAPE):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def drawn(draw: TimeDraw, step: int = 0) -> np.ndarray:
  return np.asarray(draw(STREAM, FRAMES, step), np.float64)  # not compiled as a whole: the draws share what they do


def assert_law(found, expected):
  """found: samples; expected: their cumulative distribution."""
  assert stats.kstest(found, expected).statistic * np.sqrt(len(found)) < KOLMOGOROV


def assert_share(happened, p):
  happened = np.asarray(happened)
  assert abs(happened.mean() - p) <= 4 * np.sqrt(p * (1 - p) / happened.size)


def quantile(t, law, shift):
  """The way back from a noise time, in numpy."""
  t = t / (shift - (shift - 1) * t)
  return stats.norm.cdf(special.logit(t)) if law == "logit_normal" else t


# Path


def test_the_path_ends_in_clean_and_noise_bit_for_bit():
  clean, noise = normal(0) * 1e3, normal(1) / 3
  t = jnp.array([[0., 1, .5], [1, 0, 0]])
  x = np.asarray(jit(path.noisy)(clean, noise, t))
  for b, f in np.ndindex(2, 3):
    if t[b, f] != 0.5:
      np.testing.assert_array_equal(x[b, f], (noise if t[b, f] == 1 else clean)[b, f])
  np.testing.assert_allclose(x[0, 2], (clean[0, 2] + noise[0, 2]) / 2, rtol=1e-6)


def test_a_frame_moves_by_its_own_time():
  clean, noise = np.asarray(normal(0)), np.asarray(normal(1))
  t = np.random.default_rng(2).uniform(size=(2, 3)).astype(np.float32)
  x = path.noisy(jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(t))
  for b, f in np.ndindex(2, 3):
    np.testing.assert_allclose(x[b, f], clean[b, f] + t[b, f] * (noise - clean)[b, f], atol=1e-6)


def test_velocity_is_the_slope_of_the_path():
  clean, noise = normal(0), normal(1)
  early, late = jnp.full((2, 3), 0.25), jnp.array([[.5, .75, 1.], [.375, .625, .875]])
  slope = (path.noisy(clean, noise, late) - path.noisy(clean, noise, early)) / (late - early)[..., None, None, None]
  # 2e-5: a difference of f32 numbers near 3, over a time of 1/8.
  np.testing.assert_allclose(path.velocity(clean, noise), slope, atol=2e-5)


def test_velocity_points_back_to_the_clean_clip():
  clean, noise = normal(0), normal(1)
  t = jnp.array([[0., .1, .5], [.9, .999, 1.]])
  found = path.clean_from(path.noisy(clean, noise, t), path.velocity(clean, noise), t)
  np.testing.assert_allclose(found, clean, atol=1e-6)


# Times


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0, 1, width=32), shift=st.floats(0.125, 16, width=32))
def test_a_shift_is_undone_by_its_inverse_and_has_fixed_ends(t, shift):
  pushed = times.shift_times(jnp.float32(t), shift)
  assert 0 <= pushed <= 1
  # 2e-6: the slope of either map is at most 16 and rounding is 6e-8.
  np.testing.assert_allclose(times.shift_times(pushed, 1 / shift), t, atol=2e-6)
  odds = t / (1 - t) if t < 1 else np.inf
  expected = 1.0 if np.isinf(odds) else shift * odds / (1 + shift * odds)  # the shift multiplies the odds of noise
  np.testing.assert_allclose(pushed, expected, atol=1e-6)
  assert times.shift_times(jnp.float32(0), shift) == 0 and times.shift_times(jnp.float32(1), shift) == 1


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_schedule_falls_from_one_to_zero_exactly(steps, shift):
  sigma = np.asarray(times.schedule(steps, shift))
  assert sigma.shape == (steps + 1,) and sigma[0] == 1 and sigma[-1] == 0 and (np.diff(sigma) < 0).all()
  for i in range(steps + 1):
    s = 1 - i / steps
    np.testing.assert_allclose(sigma[i], shift * s / (1 + (shift - 1) * s), atol=1e-6)


def test_the_schedule_has_the_timesteps_of_wan_unipc():
  timesteps = np.trunc(1000 * np.asarray(times.schedule(8, 5.0, start=0.999)))
  assert timesteps.tolist() == [999, 972, 937, 892, 833, 749, 624, 416, 0]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
def test_a_coin_for_each_sample_lets_frames_draw_apart(p):
  t = drawn(TimeDraw(per_frame=p, shift=3.0))
  assert_share((t == t[:, :1]).all(1), 1 - p)


def test_the_late_probability_counts_from_its_step_on():
  draw = TimeDraw(per_frame=0.0, late_per_frame=1.0, late_from=5)
  together = [(t == t[:, :1]).all(1) for t in (drawn(draw, step) for step in (0, 4, 5, 9))]
  assert together[0].all() and together[1].all() and not together[2].any() and not together[3].any()


def test_without_a_late_step_the_probability_stays():
  t = drawn(TimeDraw(per_frame=1.0), 1_000_000)
  assert (t[:, 0] != t[:, 1]).all()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("law", times.LAWS)
def test_each_frame_follows_the_law(law, shift):
  u = quantile(drawn(TimeDraw(per_frame=0.5, law=law, shift=shift)), law, shift)
  for f in (0, FRAMES - 1):
    assert_law(u[:, f], "uniform")


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.0), (0.0, 0.9), (0.2, 0.6)])
@pytest.mark.parametrize("law", times.LAWS)
def test_an_expert_draws_from_its_part_of_the_law(law, low, high):
  t = drawn(TimeDraw(per_frame=0.5, law=law, shift=5.0, low=low, high=high))
  assert low - 1e-6 <= t.min() and t.max() <= high + 1e-6
  ends = [quantile(np.float64(end), law, 5.0) for end in (low, high)]
  assert_law((quantile(t[:, 0], law, 5.0) - ends[0]) / (ends[1] - ends[0]), "uniform")


def test_frames_apart_know_nothing_of_each_other():
  u = drawn(TimeDraw(per_frame=1.0))
  for a, b in [(0, 1), (2, 5)]:
    assert abs(np.corrcoef(u[:, a], u[:, b])[0, 1]) < 4 / np.sqrt(SAMPLES)


def test_frames_of_a_block_share_their_time_and_blocks_do_not():
  u = drawn(TimeDraw(per_frame=1.0, pattern="blocks", block=4))
  assert (u[:, :4] == u[:, :1]).all() and (u[:, 4] == u[:, 5]).all() and (u[:, 3] != u[:, 4]).all()
  for f in (0, 5):
    assert_law(u[:, f], "uniform")
  assert abs(np.corrcoef(u[:, 0], u[:, 5])[0, 1]) < 4 / np.sqrt(SAMPLES)


def test_monotone_frames_are_the_order_statistics_of_uniform_numbers():
  u = drawn(TimeDraw(per_frame=1.0, pattern="monotone"))
  assert (np.diff(u) >= 0).all()
  for f in range(FRAMES):
    assert_law(u[:, f], stats.beta(f + 1, FRAMES - f).cdf)


def test_rolling_frames_are_an_even_ramp_with_a_random_offset():
  u = drawn(TimeDraw(per_frame=1.0, pattern="rolling"))
  np.testing.assert_allclose(np.diff(u), 1 / FRAMES, atol=2e-7)
  assert_law(u[:, 0] * FRAMES, "uniform")


def test_a_sample_draws_the_same_whatever_its_batch_mates():
  draw = TimeDraw(per_frame=0.5, shift=5.0)
  of = jit(lambda numbers: draw(keys.per_sample(keys.key(3, 0, "time"), numbers), FRAMES, 0))
  numbers = jnp.array([7, 0, 123, 7])
  one, other = np.asarray(of(numbers)), np.asarray(of(jnp.array([123, 0, 5, 7])))
  np.testing.assert_array_equal(one[[1, 2, 3]], other[[1, 0, 3]])
  np.testing.assert_array_equal(one[0], one[3])
  assert len(np.unique(one[:, 0])) == 3
  np.testing.assert_allclose(one, drawn(draw)[numbers], atol=1e-6)  # in a batch of 20000, rounded its own way


@pytest.mark.parametrize("wrong, line", [
  ({"law": "unifrom"}, "no law of noise times is named 'unifrom': did you mean 'uniform'?"),
  ({"pattern": "zigzag"},
   "no pattern of noise times is named 'zigzag': allowed: blocks, independent, monotone, rolling."),
  ({"per_frame": 1.5}, "per_frame = 1.5 is no probability: take 0 .. 1."),
  ({"late_per_frame": -0.1}, "late_per_frame = -0.1 is no probability: take 0 .. 1."),
  ({"per_frame": float("nan")}, "per_frame = nan is no probability: take 0 .. 1."),
  ({"shift": 0.0}, "shift 0.0 and block 1 must be positive."),
  ({"late_from": -1}, "late_from = -1 is no step: take 0 or more."),
  ({"block": 0}, "shift 1.0 and block 0 must be positive."),
  ({"low": 0.9, "high": 0.9}, "noise times from 0.9 to 0.9: take 0 <= low < high <= 1."),
])
def test_a_wrong_draw_is_told_in_one_line(wrong, line):
  with pytest.raises(BadInput) as told:
    TimeDraw(**wrong)
  assert str(told.value) == line


def test_no_steps_are_told_in_one_line():
  with pytest.raises(BadInput, match=r"^0 sampling steps: take at least 1\.$"):
    times.schedule(0, 1.0)


# Loss


@pytest.mark.parametrize("draw", [
  *(TimeDraw(per_frame=0.5, law=law, shift=shift) for law in times.LAWS for shift in SHIFTS),
  *(TimeDraw(per_frame=1.0, pattern=pattern, shift=5.0, block=2) for pattern in ["blocks", "monotone", "rolling"]),
], ids=lambda draw: f"{draw.law}-{draw.shift}-{draw.pattern}")
@pytest.mark.parametrize("name", objective.WEIGHTS)
def test_the_mean_weight_is_one_over_the_times_that_are_drawn(name, draw):
  weights = objective.weight(jnp.asarray(drawn(draw), jnp.float32), name, draw)
  of_samples = np.asarray(weights, np.float64).mean(1)  # frames of a sample depend on each other, samples do not
  assert abs(of_samples.mean() - 1) <= 4 * of_samples.std() / np.sqrt(SAMPLES) + 1e-6


def test_the_bell_has_wan_golden_values_at_shift_five():
  t = jnp.array([1.0, 0.9, 0.8, 0.5, 0.1, 0.005])
  found = np.asarray(objective.weight(t, "bell", TimeDraw(shift=5.0)))
  np.testing.assert_allclose(found, [0, 0.631, 1.207, 2.076, 0.631, 0.032], atol=6e-4)


def test_an_unknown_weight_is_told_in_one_line():
  with pytest.raises(BadInput, match=r"^no loss weight is named 'ball': did you mean 'bell'\?$"):
    objective.weight(jnp.ones(1), "ball", TimeDraw())


def one_case(seed):
  numbers = np.random.default_rng(seed)
  hidden = numbers.uniform(size=(*SHAPE[:4], 1)) < 0.5
  hidden[0, 1], hidden[1, 2] = False, True
  t = numbers.uniform(size=SHAPE[:2]).astype(np.float32)
  return np.asarray(normal(seed + 1)), np.asarray(normal(seed + 2)), hidden, t


@pytest.mark.parametrize("seed", range(3))
def test_errors_and_loss_are_those_of_a_loop_over_frames(seed):
  predicted, true, hidden, t = one_case(10 * seed)
  draw = TimeDraw(shift=5.0)
  weights = np.asarray(objective.weight(jnp.asarray(t), "bell", draw))
  counted = hidden.any((2, 3, 4)) & np.array([[True], [seed != 2]])
  errors, total, count = np.zeros(SHAPE[:2]), 0.0, 0
  for b, f in np.ndindex(SHAPE[:2]):
    cells = [cell for cell in np.ndindex(SHAPE[2:4]) if hidden[(b, f, *cell)]]
    if cells:
      errors[b, f] = np.mean([(predicted[(b, f, *cell)] - true[(b, f, *cell)]) ** 2 for cell in cells])
    if counted[b, f]:
      total, count = total + weights[b, f] * errors[b, f], count + 1

  found = objective.frame_errors(jnp.asarray(predicted), jnp.asarray(true), jnp.asarray(hidden))
  np.testing.assert_allclose(found, errors, rtol=1e-5)
  sums = objective.loss_sums(found, jnp.asarray(weights), jnp.asarray(counted))
  np.testing.assert_allclose(sums, (total, count), rtol=1e-5)


def test_errors_are_taken_in_f32():
  near = jnp.full((1, 1, 1, 1, 512), 1 + 2**-7, jnp.bfloat16)
  found = objective.frame_errors(near, jnp.ones_like(near), jnp.ones((1, 1, 1, 1, 1), bool))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, 2.0**-14, rtol=1e-6)


def test_one_sample_at_an_end_of_time_has_a_finite_loss_and_gradient():
  clean, noise = normal(0, (1, 1, 2, 2, 3)), normal(1, (1, 1, 2, 2, 3))

  @jit
  @jax.value_and_grad
  def loss(scale, t, hidden):
    x = path.noisy(clean, noise, t)
    errors = objective.frame_errors(scale * x, path.velocity(clean, noise), hidden)
    weights = objective.weight(t, "bell", TimeDraw(law="logit_normal", shift=5.0))
    total, count = objective.loss_sums(errors, weights, hidden.any((2, 3, 4)))
    return total / jnp.maximum(count, 1)

  for t in (0.0, 1.0):
    for hidden in (False, True):
      value, slope = loss(0.5, jnp.full((1, 1), t), jnp.full((1, 1, 2, 2, 1), hidden))
      assert np.isfinite(value) and np.isfinite(slope)
      np.testing.assert_allclose(value, 0, atol=1e-5)  # the bell is 0 at both ends
