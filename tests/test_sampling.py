"""Plans, solvers and the sampler against closed forms, a perfect network and the schedulers of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax.diffusion.times import schedule
from anisora_jax.errors import BadInput
from anisora_jax.sampling import guidance, plans, sampler, solvers

SHAPE = (2, 4, 3, 2, 2)  # b f h w c
SOLVERS = pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)


def shifted(steps, shift, start=1.0):
  s = np.linspace(start, 0, steps + 1)
  return (shift * s / (1 + (shift - 1) * s)).astype(np.float32)


def normal(seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


NOISE, CLEAN, DRIFT = normal(0), normal(1), normal(2)


def perfect(x, told):
  """The velocity of a network that knows the clip; at time 0 it has none, and nan must not reach a frame at rest."""
  told = told[..., None, None, None]
  return jnp.where(told > 0, (x - CLEAN) / told, jnp.nan)


def drifting(x, told):
  """A velocity that is the same everywhere: every path is straight."""
  return DRIFT


def curved(x, told):
  """A smooth network that mixes frames, rows and channels and reads its time."""
  told = told[..., None, None, None]
  return jnp.tanh(x + 0.5 * jnp.roll(x, 1, 1) - 0.3 * x[..., ::-1] + told) + 0.2 * told * x


def states_of(solver, velocity, plan, x):
  """The states after every row, by a plain loop: what `walk` scans over."""
  memory, states, all_rows = solver.start(x), [x], sampler.rows(plan)
  for r in range(len(plan.told)):
    row = jax.tree.map(lambda leaf, r=r: leaf[r], all_rows)
    x, memory = solver.step(lambda x, told: velocity(x, jnp.broadcast_to(told, x.shape[:2])), x, row, memory)
    states.append(x)
  return states


sample = jax.jit(sampler.sample, static_argnums=(0, 4))
walk = jax.jit(sampler.walk, static_argnums=(0, 4))


def plan_of(columns):
  """A plan whose frames walk these columns, each on its own clock."""
  tau = np.stack(columns, 1).astype(np.float32)
  return plans.Plan(tau=tau, told=tau[:-1], start=tau[0])


def staircase():
  """Frames that start late, rest half-way, end early, and one that is given."""
  return plan_of([[1, .8, .5, .2, .1, 0, 0], [1, 1, 1, .9, .6, .2, 0],
                  [1, .7, .7, .7, .4, .4, 0], [0, 0, 0, 0, 0, 0, 0]])


PLANS = {
  "sync": plans.sync(shifted(6, 3.0), np.ones(4)),
  "starts below 1": plans.sync(shifted(6, 5.0, .999), np.ones(4)),
  "first and last": plans.sync(shifted(6, 3.0), np.array([0., 1, 1, 0])),
  "multipliers": plans.sync(shifted(6, 3.0), np.array([.2, 1, .6, 0])),
  "one step": plans.sync(shifted(1, 3.0), np.ones(4)),
  "all given": plans.sync(shifted(6, 3.0), np.zeros(4)),
  "staircase": staircase(),
}


@SOLVERS
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_perfect_network_brings_the_clip_back(plan, solver):
  result = sample(perfect, plan, NOISE, CLEAN, solver)
  np.testing.assert_allclose(result, CLEAN, atol=2e-5)  # f32 divides by times near 0


@SOLVERS
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_straight_path_is_landed_on(plan, solver):
  begin = sampler.begin(plan, NOISE, CLEAN)
  result = sample(drifting, plan, NOISE, CLEAN, solver)
  np.testing.assert_allclose(result, begin - plan.tau[0][:, None, None, None] * DRIFT, atol=1e-5)


@SOLVERS
@given(columns=st.lists(st.lists(st.integers(0, 64), min_size=5, max_size=5), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_falling_clocks_bring_the_clip_back(columns, solver):
  # In 64ths: a perfect network divides by its time, so at times like 1e-13 it reports rounding errors magnified.
  plan = plan_of([[time / 64 for time in (*sorted(column, reverse=True), 0)] for column in columns])
  result = sample(perfect, plan, NOISE, CLEAN, solver)
  np.testing.assert_allclose(result, CLEAN, atol=1e-4)


def gaussian_error(solver, steps):
  """Distance from the exact end of the flow of a Gaussian, x(0) = mean + spread x(1)."""
  mean, spread = 0.7, 0.3

  def velocity(x, told):
    t = told[..., None, None, None]
    variance = (1 - t) ** 2 * spread ** 2 + t ** 2
    return -mean + (t - (1 - t) * spread ** 2) / variance * (x - (1 - t) * mean)

  plan = plans.sync(np.linspace(1, 0, steps + 1), np.ones(4))
  result = sample(velocity, plan, NOISE, CLEAN, solver)
  return float(jnp.abs(result - (mean + spread * NOISE)).max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
def test_solvers_converge_at_their_order(name, order):
  coarse, fine = (gaussian_error(solvers.SOLVERS[name], steps) for steps in (80, 160))
  assert abs(np.log2(coarse / fine) - order) < 0.1, (coarse, fine)


@pytest.mark.parametrize(("steps", "shift", "start"), [(8, 5.0, .999), (20, 3.0, .999), (12, 5.0, 1.0), (1, 3.0, .999),
                                                       (2, 3.0, .999)])
def test_unipc_is_the_unipc_of_diffusers_at_every_step(steps, shift, start):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
  theirs.set_timesteps(sigmas=np.linspace(start, 0, steps + 1)[:-1])
  plan = plans.sync(theirs.sigmas.numpy(), np.ones(4))
  states = states_of(solvers.unipc, curved, plan, NOISE)
  x = torch.from_numpy(np.array(NOISE))
  for r, timestep in enumerate(theirs.timesteps):
    told = jnp.full(SHAPE[:2], float(theirs.sigmas[r]))
    v = torch.from_numpy(np.array(curved(jnp.asarray(x.numpy()), told)))
    x = theirs.step(v, timestep, x, return_dict=False)[0]
    np.testing.assert_allclose(states[r + 1], x.numpy(), atol=1e-4)


def test_euler_is_the_euler_of_diffusers():
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
  theirs.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1])
  plan = plans.sync(theirs.sigmas.numpy(), np.ones(4))
  states = states_of(solvers.euler, curved, plan, NOISE)
  x = torch.from_numpy(np.array(NOISE))
  for r, timestep in enumerate(theirs.timesteps):
    told = jnp.full(SHAPE[:2], float(theirs.sigmas[r]))
    v = torch.from_numpy(np.array(curved(jnp.asarray(x.numpy()), told)))
    x = theirs.step(v, timestep, x, return_dict=False)[0]
    np.testing.assert_allclose(states[r + 1], x.numpy(), atol=1e-5)


def test_unipc_weights_are_exact_for_small_and_large_moves():
  h = np.array([1e-4, 1e-2, .29, .31, 1, 5, 18], np.float64)
  z, r = -h, np.full_like(h, -.7)
  e = np.array([float(np.expm1(np.longdouble(v))) for v in z])
  with np.errstate(all="raise"):
    big = z.astype(np.longdouble)
    # Below 0.3 even long double cancels at 1e-4: there the limits 1/2 - z/12 and 1/3 - z/12 are exact enough.
    g1 = np.where(h < 1e-3, big / 2 + big ** 2 / 6 + big ** 3 / 24, np.expm1(big) / big - 1)
    g2 = np.where(h < 1e-3, big / 6 + big ** 2 / 24 + big ** 3 / 120, (np.expm1(big) / big - 1) / big - .5)
  matrix = [np.linalg.solve([[1, 1], [r0, 1]], [float(a / b), float(2 * c / b)])
            for r0, a, b, c in zip(r, g1, e, g2, strict=True)]
  ours = solvers._corrector_weights(jnp.asarray(h, jnp.float32), jnp.asarray(r, jnp.float32), jnp.ones(7, bool))
  np.testing.assert_allclose(np.stack(ours, 1), matrix, rtol=2e-5)


@SOLVERS
def test_a_frame_whose_time_stands_still_does_not_move(solver):
  states, plan = states_of(solver, curved, PLANS["staircase"], NOISE), PLANS["staircase"]
  for r, f in np.argwhere(plan.tau[1:] == plan.tau[:-1]):
    np.testing.assert_array_equal(states[r + 1][:, f], states[r][:, f])
  for r, f in np.argwhere(plan.tau[1:] < plan.tau[:-1]):
    assert (states[r + 1][:, f] != states[r][:, f]).any()


@SOLVERS
def test_the_scan_is_the_loop(solver):
  plan = PLANS["staircase"]
  states = states_of(solver, curved, plan, sampler.begin(plan, NOISE, CLEAN))
  np.testing.assert_allclose(sample(curved, plan, NOISE, CLEAN, solver), states[-1], atol=1e-6)


@SOLVERS
@given(cuts=st.sets(st.integers(1, 5)))
@settings(max_examples=8, deadline=None)
def test_a_plan_walked_in_pieces_is_the_plan_walked_at_once(cuts, solver):
  plan, ends = PLANS["staircase"], [0, *sorted(cuts), 6]
  x = sampler.begin(plan, NOISE, CLEAN)
  memory = solver.start(x)
  for piece in map(slice, ends, ends[1:]):
    x, memory = walk(curved, sampler.rows(plan, piece), x, memory, solver)
  np.testing.assert_allclose(x, sample(curved, plan, NOISE, CLEAN, solver), atol=1e-6)


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_whole_times_are_the_timesteps_of_diffusers(shift):
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
  for steps in range(1, 61):
    for start, end in ((.999, 0), (1, .001)):
      theirs.set_timesteps(sigmas=np.linspace(start, end, steps + 1)[:-1])
      plan = plans.sync(schedule(steps, shift, float(start), float(end)), np.ones(1), whole=True)
      np.testing.assert_allclose(plan.tau[:, 0], theirs.sigmas.numpy(), atol=2e-6)  # theirs has 1 - 1e-6 for 1
      np.testing.assert_array_equal(plan.told[:, 0], np.float32(theirs.timesteps.numpy() / 1000))


def test_whole_times_of_eight_steps():
  sigmas = schedule(8, 5.0, .999)
  plan, exact = (plans.sync(sigmas, np.array([0, .5, 1], np.float32), whole) for whole in (True, False))
  np.testing.assert_array_equal(np.round(plan.told * 1000).T, [
    [0] * 8, [499, 486, 468, 446, 416, 374, 312, 208], [999, 972, 937, 892, 833, 749, 624, 416]])
  np.testing.assert_array_equal(plan.tau, exact.tau)
  assert sampler.pieces(plan, .892) == [(0, slice(0, 4)), (1, slice(4, 8))]  # a row at the boundary is above it


@pytest.mark.parametrize(("steps", "boundary", "experts"), [
  (8, .9, [(0, slice(0, 3)), (1, slice(3, 8))]),
  (40, .9, [(0, slice(0, 15)), (1, slice(15, 40))]),
  (8, .892, [(0, slice(0, 4)), (1, slice(4, 8))]),
  (8, 1.0, [(1, slice(0, 8))]),
  (8, 0.0, [(0, slice(0, 8))]),
  (8, None, [(0, slice(0, 8))]),
])
def test_noisy_rows_go_to_the_first_expert(steps, boundary, experts):
  for multiplier in ([1, 1], [0, 1], [.3, 1]):  # what is given has no say
    plan = plans.sync(shifted(steps, 5.0, .999), np.array(multiplier, np.float32))
    assert sampler.pieces(plan, boundary) == experts


def test_experts_by_turns_are_pieces_of_their_own():
  plan = plan_of([[.9, .7, .7, .2, 0]]).replace(told=np.float32([[.9], [.1], [.8], [.2]]))
  assert [expert for expert, _ in sampler.pieces(plan, .5)] == [0, 1, 0, 1]


@pytest.mark.parametrize("boundary", [-.1, 900.0])
def test_a_boundary_is_a_noise_time(boundary):
  with pytest.raises(BadInput, match=rf"in \[0, 1\], got {boundary:g}: Wan 2.2 has 0.9 or 0.875"):
    sampler.pieces(PLANS["sync"], boundary)


@SOLVERS
def test_a_given_frame_comes_out_bit_for_bit_and_a_free_one_never_saw_it(solver):
  plan = plans.sync(shifted(6, 5.0, .999), np.array([0., 1, .3, 1]))
  noise, clean = NOISE.at[:, 0].set(jnp.nan), CLEAN.at[:, 1::2].set(jnp.nan)
  result = sample(curved, plan, noise, clean, solver)
  np.testing.assert_array_equal(result[:, 0], CLEAN[:, 0])
  assert jnp.isfinite(result).all()


def test_the_start_mixes_given_latents_and_noise_by_the_multiplier():
  plan = plans.sync(shifted(6, 1.0), np.array([0, .25, .5, 1]))
  m = np.array([0, .25, .5, 1], np.float32)[:, None, None, None]
  np.testing.assert_allclose(sampler.begin(plan, NOISE, CLEAN), (1 - m) * CLEAN + m * NOISE, atol=1e-6)


@SOLVERS
def test_held_cells_come_out_bit_for_bit(solver):
  held = jnp.asarray(np.random.default_rng(5).random((*SHAPE[:4], 1)) < .5)
  result = sample(curved, PLANS["sync"], NOISE, CLEAN, solver, held)
  free = sample(curved, PLANS["sync"], NOISE, CLEAN, solver)
  np.testing.assert_array_equal(result, np.where(held, CLEAN, free))


@SOLVERS
def test_equal_columns_are_the_scalar_sampler(solver):
  """Each frame alone, on a plan of one frame, goes where it goes among others: no clock leaks into another."""
  def alone(x, told):
    return jnp.tanh(x + told[..., None, None, None])

  mixed = PLANS["staircase"]
  together = sample(alone, mixed, NOISE, CLEAN, solver)
  for f in range(SHAPE[1]):
    single = jax.tree.map(lambda leaf, f=f: leaf[..., f:f + 1], mixed)
    one = sample(alone, single, NOISE[:, f:f + 1], CLEAN[:, f:f + 1], solver)
    np.testing.assert_allclose(together[:, f:f + 1], one, atol=1e-6)


@pytest.mark.parametrize(("name", "calls"), [("euler", 6), ("unipc", 6), ("heun", 11)])
def test_the_network_is_called_no_more_than_needed(name, calls):
  seen = []

  def counted(x, told):
    jax.debug.callback(lambda told: seen.append(np.array(told)), told)
    return curved(x, told)

  def never(x, told):
    raise AssertionError("scale 1 needs no blank pass")

  one_pass = guidance.text(counted, never, 1.0)
  plan = plans.sync(shifted(6, 3.0), np.array([0., 1, 1, .5]))
  jax.block_until_ready(sampler.sample(one_pass, plan, NOISE, CLEAN, solvers.SOLVERS[name]))
  jax.effects_barrier()
  assert len(seen) == calls
  assert {tuple(told[0]) for told in seen} == {tuple(np.asarray(row)) for row in plan.told}


def test_guidance_is_its_formula():
  def blank(x, told):
    return 1 - curved(x, told)

  told = jnp.full(SHAPE[:2], .5)
  a, b = curved(NOISE, told), blank(NOISE, told)
  np.testing.assert_allclose(guidance.text(curved, blank, 5.0)(NOISE, told), b + 5 * (a - b), atol=1e-6)
  np.testing.assert_allclose(guidance.text(curved, blank, 0.0)(NOISE, told), b, atol=1e-6)


@SOLVERS
def test_one_compilation_serves_all_plans_of_a_size(solver):
  traces = []

  @jax.jit
  def run(plan, noise, clean):
    traces.append(1)
    return sampler.sample(curved, plan, noise, clean, solver)

  for name in ("sync", "first and last", "multipliers", "starts below 1"):
    assert jnp.isfinite(run(PLANS[name], NOISE, CLEAN)).all()
  assert len(traces) == 1


@SOLVERS
def test_no_nan_is_born_where_a_frame_rests(solver):
  slope = jax.jit(jax.grad(lambda x: sampler.sample(curved, PLANS["staircase"], x, CLEAN, solver).sum()))(NOISE)
  assert jnp.isfinite(slope).all()


@pytest.mark.parametrize(("sigmas", "multiplier", "words"), [
  ([1, .5, .6, 0], [1], "rises at row 1 from 0.5 to 0.6"),
  ([1, .5, .1], [1], "must end at 0"),
  ([0], [1], "at least 2"),
  ([1.2, 0], [1], r"lie in \[0, 1\]"),
  ([float("nan"), 0], [1], r"lie in \[0, 1\]"),
  ([1, 0], [1.5], "between 0 .* and 1"),
])
def test_a_wrong_walk_is_refused_in_one_line(sigmas, multiplier, words):
  with pytest.raises(BadInput, match=words) as refusal:
    plans.sync(np.array(sigmas, np.float32), np.array(multiplier, np.float32))
  assert "\n" not in str(refusal.value)
