"""Which clips are worked at once, and over how many devices each of them is split.

A microstep is one program on all N devices: N / p groups of p devices, of which each works its own clips one after the
other, and all wait for the last. Long clips want large p, for memory and so that none waits for them; short ones small
p, as they would send more than they compute. Clips, sorted by length, are cut into runs, each a microstep of its own p;
inside, every clip goes, longest first, to the group that is done first (Graham 1969, doi:10.1137/0117039):
  best[j] = min over i < j and p of best[i] + slowest group of clips i .. j - 1
which is the least time of all such plans. The aim is that of FlexSP (arXiv:2412.01523) and ByteScale
(arXiv:2502.21231), within one program at a time.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from anisora_jax.errors import BadInput


@dataclass(frozen=True)
class Cost:
  """Seconds of a clip of s tokens over p devices, (linear s + square s^2 + sent s (p - 1) / p) / p + fixed.

  linear, square: seconds of one device for a token, and for a pair of them. sent: seconds of the links for a token that
  changes its device and comes back. turned: of a token whose keys visit every device, p - 1 times as often, of which
  only counts what takes longer than the pairs. fixed: of every clip, however short. start: of every microstep. room:
  tokens that a device can hold.
  """

  linear: float
  square: float
  sent: float = 0.0
  turned: float = 0.0
  fixed: float = 0.0
  start: float = 0.0
  room: float = math.inf

  def seconds(self, tokens: int, degree: int) -> float:
    if tokens > self.room * degree:
      return math.inf
    away = tokens * (degree - 1) / degree
    waits = max(0.0, self.turned * away - self.square * tokens**2 / degree)
    return (self.work(tokens) + self.sent * away) / degree + waits + self.fixed

  def work(self, tokens: int) -> float:
    """Seconds of one device for a clip's arithmetic, which no plan can save."""
    return self.linear * tokens + self.square * tokens**2


class Microstep(NamedTuple):
  """degree: devices that share a clip. groups: the lengths of the clips of each group. seconds: of the slowest."""

  degree: int
  groups: tuple[tuple[int, ...], ...]
  seconds: float


def dealt(lengths: Sequence[int], degree: int, devices: int, cost: Cost) -> Microstep:
  """The clips of a microstep, longest first, each given to the group that is done first."""
  groups: list[list[int]] = [[] for _ in range(devices // degree)]
  done = [(0.0, group) for group in range(len(groups))]
  for length in sorted(lengths, reverse=True):
    busy, group = heapq.heappop(done)
    groups[group].append(length)
    heapq.heappush(done, (busy + cost.seconds(length, degree), group))
  return Microstep(degree, tuple(map(tuple, groups)), cost.start + max(busy for busy, _ in done))


def slowest(lengths: Sequence[int], degree: int, devices: int, cost: Cost) -> np.ndarray:
  """Seconds of the microstep of the first n clips, n = 0 .. len(lengths); lengths: longest first."""
  done, found = [0.0] * (devices // degree), [0.0]
  for length in lengths:
    heapq.heapreplace(done, done[0] + cost.seconds(length, degree))
    found.append(max(found[-1], max(done)))
  return np.array(found)


def plan(lengths: Sequence[int], devices: int, degrees: Sequence[int], cost: Cost) -> list[Microstep]:
  """The microsteps of least time in all. degrees: of which each microstep has one. Raises BadInput."""
  for degree in degrees:
    if devices % degree:
      raise BadInput(f"{devices} devices are not groups of {degree}: take divisors of {devices}.")
  lengths = sorted(lengths, reverse=True)
  if lengths and lengths[0] > cost.room * max(degrees):
    raise BadInput(f"a clip of {lengths[0]} tokens is more than the {cost.room:,.0f} a device holds, times "
                   f"{max(degrees)}: take shorter clips, or more devices for each.")
  count = len(lengths)
  best = np.full(count + 1, math.inf)
  best[0], choice = 0.0, [(0, 0)] * (count + 1)
  for i in range(count):
    for degree in degrees:
      ends = best[i] + cost.start + slowest(lengths[i:], degree, devices, cost)[1:]
      for j in np.flatnonzero(ends < best[i + 1:] * (1 - 1e-12)):
        best[i + 1 + j], choice[i + 1 + j] = ends[j], (i, degree)
  found, end = [], count
  while end:
    start, degree = choice[end]
    found.append(dealt(lengths[start:end], degree, devices, cost))
    end = start
  return found[::-1]


def seconds(microsteps: Sequence[Microstep]) -> float:
  return sum(one.seconds for one in microsteps)


def idle(microsteps: Sequence[Microstep], devices: int, cost: Cost) -> float:
  """The share of the devices' time in which they do no arithmetic: they wait, send, or start."""
  useful = sum(cost.work(length) for one in microsteps for group in one.groups for length in group)
  return 1 - useful / (devices * seconds(microsteps))
