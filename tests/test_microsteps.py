"""Microsteps: the best of their family by trying all, never below what an integer program proves, never above one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from anisora_jax.errors import BadInput
from anisora_jax.models.wan.sizes import SIZES
from anisora_jax.planning import advice
from anisora_jax.planning.microsteps import Cost, dealt, idle, plan, seconds
from anisora_jax.training import report

COSTS = [Cost(1.0, 0.0), Cost(1.0, 0.02, sent=2.0, fixed=3.0), Cost(0.5, 0.05, sent=9.0, fixed=1.0, start=20.0),
         Cost(1.0, 0.01, sent=30.0, fixed=5.0, start=2.0, room=60.0)]
CLIPS = st.lists(st.sampled_from([3, 8, 20, 50, 90, 120]), min_size=1, max_size=7)


def least(lengths, devices, degrees, cost):
  """The least time over all cuts of the sorted clips into runs and all degrees, by trying each."""
  if not lengths:
    return 0.0
  return min(dealt(lengths[:n], degree, devices, cost).seconds + least(lengths[n:], devices, degrees, cost)
             for n in range(1, len(lengths) + 1) for degree in degrees)


def below(lengths, devices, degrees, cost):
  """A time that no microsteps at all can go below: an integer program over how many clips go to each degree.

  The microsteps of degree p together take at least p / N of what their clips take, and at least the longest of them.
  """
  sizes, counts = np.unique(lengths, return_counts=True)
  q, p = len(sizes), len(degrees)
  time = np.array([[cost.seconds(int(size), degree) for degree in degrees] for size in sizes])
  allowed = np.isfinite(time)
  time = np.where(allowed, time, 0)
  # Unknowns: clips [q, p], whether a size is at a degree [q, p], seconds of each degree [p].
  total, rows, low, high = 2 * q * p + p, [], [], []
  def row(entries, least, most):
    rows.append(np.zeros(total))
    for at, value in entries:
      rows[-1][at] += value
    low.append(least)
    high.append(most)
  for i in range(q):
    row([(i * p + d, 1) for d in range(p)], counts[i], counts[i])
    for d in range(p):
      row([(i * p + d, 1), (q * p + i * p + d, -counts[i])], -np.inf, 0)
      row([(2 * q * p + d, 1), (q * p + i * p + d, -time[i, d] - cost.start)], 0, np.inf)
  for d, degree in enumerate(degrees):
    row([(2 * q * p + d, 1)] + [(i * p + d, -time[i, d] * degree / devices) for i in range(q)], 0, np.inf)
  upper = np.concatenate([np.where(allowed, counts[:, None], 0).ravel(), np.ones(q * p), np.full(p, np.inf)])
  whole = np.concatenate([np.ones(2 * q * p), np.zeros(p)])
  goal = np.concatenate([np.zeros(2 * q * p), np.ones(p)])
  found = milp(goal, constraints=LinearConstraint(np.array(rows), low, high), integrality=whole,
               bounds=Bounds(np.zeros(total), upper))
  assert found.success
  return found.fun


@given(CLIPS, st.sampled_from(COSTS), st.sampled_from([(4, (1, 2, 4)), (6, (2, 3, 6)), (8, (4, 8))]))
@settings(deadline=None, max_examples=60)
def test_no_cut_of_the_sorted_clips_is_faster(lengths, cost, machine):
  devices, degrees = machine
  if max(lengths) > cost.room * max(degrees):
    return
  found = plan(lengths, devices, degrees, cost)
  assert sorted(length for one in found for group in one.groups for length in group) == sorted(lengths)
  np.testing.assert_allclose(seconds(found), least(sorted(lengths, reverse=True), devices, degrees, cost), rtol=1e-9)
  for one in found:
    busy = [sum(cost.seconds(length, one.degree) for length in group) for group in one.groups]
    np.testing.assert_allclose(one.seconds, cost.start + max(busy))
    assert all(length <= cost.room * one.degree for group in one.groups for length in group)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", COSTS)
def test_plans_are_no_faster_than_can_be_and_no_slower_than_any_single_degree(seed, cost):
  lengths = np.random.default_rng(seed).choice([3, 8, 20, 50, 120, 200], 40).tolist()
  degrees, devices = (1, 2, 4, 8), 8
  found = seconds(plan(lengths, devices, degrees, cost))
  bound = below(lengths, devices, degrees, cost)
  single = min(dealt(lengths, degree, devices, cost).seconds for degree in degrees)
  assert bound * (1 - 1e-6) <= found <= single * (1 + 1e-9)
  assert found <= 1.12 * bound  # how near it comes; the mean is 1.03


def test_devices_are_idle_for_what_is_not_arithmetic():
  cost = Cost(1.0, 0.0, fixed=1.0)
  one, = plan([3, 3, 3, 3], 4, (1,), cost)
  assert one.seconds == 4 and idle([one], 4, cost) == pytest.approx(1 / 4)
  two, = plan([3, 1], 2, (1,), Cost(1.0, 0.0))
  assert idle([two], 2, Cost(1.0, 0.0)) == pytest.approx(1 / 3)


def test_long_clips_are_split_and_short_ones_are_not():
  cost = Cost(1.0, 0.001, sent=50.0, room=1000.0)
  found = plan([4000] + [100] * 32, 8, (1, 2, 4, 8), cost)
  assert [one.degree for one in found] == [8, 1] and math.isfinite(seconds(found))


def test_what_cannot_be_planned_is_one_clear_line():
  with pytest.raises(BadInput, match="8 devices are not groups of 3"):
    plan([1], 8, (1, 3), COSTS[0])
  with pytest.raises(BadInput, match="a clip of 700 tokens is more than the 60 a device holds, times 8"):
    plan([700, 1], 8, (1, 8), COSTS[3])


# advice for buckets


@pytest.mark.parametrize("name", ["wan21_i2v_14b", "tiny"])
def test_the_cost_of_a_clip_is_its_arithmetic_at_half_the_peak(name):
  size, rate = SIZES[name], 989e12
  cost = advice.cost(size, rate, 4.5e11, exchanged=True)
  for tokens in (1, 32_760, 75_600):
    np.testing.assert_allclose(cost.seconds(tokens, 1), 3 * size.forward_flops(1, tokens) / (rate / 2), rtol=1e-9)


def test_what_is_exchanged_is_counted_by_hand():
  size, links = SIZES["wan21_i2v_14b"], 4.5e11
  cost, s, p = advice.cost(size, 989e12, links, exchanged=True), 75_600, 8
  # q, k, v, o and their gradients, in bf16, of the tokens of a device, all but those that stay; each of 40 layers
  sent = 40 * 8 * 2 * 5120 * (s / p) * (p - 1) / p / (0.75 * links)
  np.testing.assert_allclose(cost.seconds(s, p) - cost.fixed - cost.work(s) / p, sent, rtol=1e-9)
  ring = advice.cost(size, 989e12, links, exchanged=False)
  np.testing.assert_allclose(ring.seconds(s, p), ring.fixed + ring.work(s) / p, rtol=1e-9)  # hides behind the pairs
  slow = advice.cost(size, 989e12, links / 100, exchanged=False)
  assert slow.seconds(s, p) > ring.seconds(s, p)


def test_the_advised_degree_is_the_one_of_least_time_a_clip():
  cost = advice.cost(SIZES["wan21_i2v_14b"], 989e12, 4.5e11, exchanged=True)
  long, short = advice.Clips("long", 75_600, 8, {8: 3, 4: 4, 2: 4}), advice.Clips("short", 4_000, 8, {8: 16, 1: 16})
  for clips, one in zip((long, short), advice.advise([long, short], 8, cost), strict=True):
    times = {degree: cost.seconds(clips.tokens, degree) * math.ceil(batch / (8 // degree)) / batch
             for degree, batch in clips.degrees.items()}
    assert one.degree == min(times, key=times.get) and one.batch == clips.degrees[one.degree]
    useful = cost.work(clips.tokens) / 8
    np.testing.assert_allclose([one.idle, one.now], [1 - useful / times[one.degree], 1 - useful / times[8]], rtol=1e-6)
  told = advice.lines([long, short], 8, cost)
  assert "short: better @16/1, where devices idle " in told[1] and "; now " in told[1]
  bound = float(told[2].partition(": ")[2].rstrip("%")) / 100
  assert 0 <= bound < advice.advise([long], 8, cost)[0].now + 0.05


def test_links_are_known_for_devices_whose_peak_is():
  assert set(advice.LINKS) == set(report.PEAKS)
