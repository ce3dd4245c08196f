"""How many of the best clips to train on, and how often, for a training of a given length.

The best clips teach most, but less at every repetition; so the longer the training, the more of the lesser ones belong
in. With n sample passes made, the loss falls as

  loss = floor + scale y,   dy/dn = -b y / (n + unit),   y(0) = 1

where b is the mean utility of the clips in the pool, halved with every `half_life` repetitions: in the k-th repetition
(k = 0 the first pass) b_k = b 2^(-k / half_life). So y = prod_k ((n_k + unit) / (n_(k-1) + unit))^-b_k with n_k the
passes made by the end of repetition k. A pool p times as large forgets a repetition p times as long: its half-life is
p times that of the pool it was measured on.

From: Goyal et al. 2024, arXiv:2404.07177, "Scaling Laws for Data Filtering", sections 3 and 4. Two departures: passes
are counted from `unit` on, so that an untrained network loses the same whatever it will be shown (the paper's n^-b
makes the better pool the worse one before n = unit); and utilities fall smoothly with rank instead of in four pools.

The numbers of PUBLISHED were fitted by its authors to image-text pairs (CLIP, error on ImageNet; their repository,
results/parameter_values.jsonl), as there are none for video: utilities .16, .125, .1, .085 of the best four tenths,
which .178 exp(-2.1 rank) meets within .006, half-lives of 6.7, 8.5, 5.3, 2.3 repetitions of one tenth, and a unit of
.03 of all clips. Whoever can, measures a few short trainings and gives them as `points`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares  # jax needs scipy as well
from scipy.stats import rankdata

from anisora_jax.errors import BadInput, nearest
from anisora_jax.evaluation import curve
from curation.items import Candidate, Rejected

SIZES = 200       # pools tried, spread evenly in the logarithm of their size
EXACT = 1024      # repetitions reckoned one by one; later ones in blocks of 1/64 of those before
GAIN = 1e-3       # share of what can still be learned; a further repetition that brings less is not worth its compute


@dataclass(frozen=True)
class Law:
  """How loss falls with passes over ranked clips; all shares are of the clips that are ranked.

  utility: of the best clip. fall: utility at rank r, 0 best .. 1 worst, is utility exp(-fall r). half_life: repetitions
  of a pool of the share `tenth` after which a clip teaches half. unit: passes, as a share of the clips, before which
  little is learned. floor, scale: of the loss; the choice does not depend on them.
  """
  utility: float
  fall: float
  half_life: float
  unit: float
  tenth: float = .1
  floor: float = 0.
  scale: float = 1.

  def __post_init__(self):
    if not (self.utility > 0 and self.unit > 0 and self.half_life >= 0 and 0 < self.tenth <= 1
            and math.isfinite(self.fall)):
      raise BadInput(f"a law with utility {self.utility:g}, unit {self.unit:g}, half-life {self.half_life:g} and pools "
                     f"of {self.tenth:g}: utility and unit must be above 0, the half-life not below, pools 0 to 1.")

  def mean_utility(self, low: float, high: float) -> float:
    """Of the clips between two ranks."""
    width = self.fall * (high - low)
    mean = -math.expm1(-width) / width if abs(width) > 1e-9 else 1.
    return self.utility * math.exp(-self.fall * low) * mean

  def loss(self, low: float, high: float, passes: float) -> float:
    """After training on the clips between two ranks. passes: per ranked clip, whether it is in the pool or not."""
    learned = progress(high - low, passes, self.half_life * (high - low) / self.tenth, self.unit)
    return self.floor + self.scale * math.exp(-self.mean_utility(low, high) * learned)


PUBLISHED = Law(utility=.178, fall=2.1, half_life=6., unit=.03)


def progress(pool: float, passes: float, half_life: float, unit: float) -> float:
  """What is learned, -log(y) / b, with passes over a pool. pool, passes, unit: clips, or shares of all of them."""
  if half_life == math.inf:
    return math.log1p(passes / unit)
  starts = _repetitions(passes / pool)
  ends = np.append(starts[1:], max(passes / pool, starts[-1]))
  # A block of repetitions weighs as its middle one; a block of one is exact.
  middle = (starts + np.maximum(np.ceil(ends), starts + 1) - 1) / 2
  weights = np.exp2(-middle / half_life) if half_life > 0 else (starts == 0).astype(float)
  return float((weights * np.log((ends * pool + unit) / (starts * pool + unit))).sum())


def _repetitions(count: float) -> np.ndarray:
  """Where repetitions, from EXACT on blocks of them, start, up to `count` passes over a pool."""
  starts = np.arange(min(math.ceil(count), EXACT) or 1, dtype=float)
  if count > EXACT:
    later = np.floor(np.geomspace(EXACT, count, math.ceil(64 * math.log(count / EXACT)) + 2))
    starts = np.concatenate([starts, np.unique(later[later < count])])
  return starts


@dataclass(frozen=True)
class Point:
  """One training that was measured: on the clips between two ranks (0 best .. 1 worst), for so many passes per ranked
  clip (a training on the best tenth that shows each of it 3 times has .3), to this loss."""
  low: float
  high: float
  passes: float
  loss: float

  def __post_init__(self):
    if not (0 <= self.low < self.high <= 1 and self.passes >= 0 and math.isfinite(self.loss)):
      raise BadInput(f"point {self.low:g} .. {self.high:g}, {self.passes:g} passes, loss {self.loss:g}: ranks are 0 "
                     "(best) to 1, rising, and passes 0 or more.")


@dataclass(frozen=True)
class Choice:
  """keep: of the ranked clips, from the best. repeats: passes over each. passes: all of them, at most the budget.

  loss: expected. sizes, losses: the curve, loss for each number of clips with the whole budget.
  """
  keep: int
  repeats: float
  passes: int
  loss: float
  sizes: tuple[int, ...]
  losses: tuple[float, ...]


def choose(count: int, passes: int, law: Law = PUBLISHED) -> Choice:
  """The number of the best of `count` ranked clips, and the repetitions, of least loss after `passes` sample passes.

  No more clips are kept than are seen; a larger pool is taken where two do equally well. Where the last repetitions
  bring next to nothing (GAIN) they are left out, and passes fall below the budget.
  """
  if count < 1 or passes < 1:
    raise BadInput(f"{passes} passes over {count} clips: both must be at least 1.")
  most = min(count, passes)
  sizes = sorted({round(size) for size in np.geomspace(1, most, min(SIZES, most))})
  best, _ = _least(sizes, count, passes, law)
  at = sizes.index(best)
  # Around the best of these every clip counts, up to a fine enough step.
  near = range(sizes[max(at - 1, 0)], sizes[min(at + 1, len(sizes) - 1)] + 1)
  sizes = sorted({*sizes, *(round(size) for size in np.linspace(near[0], near[-1], min(len(near), SIZES)))})
  best, losses = _least(sizes, count, passes, law)
  used = _worthwhile(best / count, passes / count, law)
  total = min(passes, round(used * count))
  return Choice(best, total / best, total, law.loss(0, best / count, total / count), tuple(sizes), tuple(losses))


def _least(sizes: Sequence[int], count: int, passes: int, law: Law) -> tuple[int, list[float]]:
  losses = [law.loss(0, size / count, passes / count) for size in sizes]
  least = min(losses)
  return max(size for size, loss in zip(sizes, losses, strict=True)
             if loss - least <= 1e-12 * max(1, abs(least))), losses


def _worthwhile(pool: float, passes: float, law: Law) -> float:
  """The passes after which a further repetition of the pool would gain less than GAIN of what is left to learn."""
  repeats = math.ceil(passes / pool - 1e-9)
  half_life = law.half_life * pool / law.tenth
  if half_life == math.inf or repeats <= 1:
    return passes
  utility = law.mean_utility(0, pool)

  def gain(k: float) -> float:
    decayed = 2.0 ** (-k / half_life) if half_life > 0 else 0.
    return utility * decayed * math.log(((k + 1) * pool + law.unit) / (k * pool + law.unit))

  low, high = 1, repeats  # the gain of repetition k falls with k
  while low < high:
    middle = (low + high) // 2
    low, high = (middle + 1, high) if gain(middle) >= GAIN else (low, middle)
  return min(passes, low * pool)


def fit(points: Sequence[Point], tenth: float = .1) -> Law:
  """The law of least squares over measured trainings. tenth: share of the pool that the law's half-life is of.

  At least 6 points, of two pools or more and with some repetition. Raises BadInput for others, and where they follow no
  such law.
  """
  if len(points) < 6 or len({(point.low, point.high) for point in points}) < 2:
    raise BadInput(f"{len(points)} points do not fix a law of 6 numbers: give 6 or more, of at least 2 pools.")
  if all(point.passes <= point.high - point.low for point in points):
    raise BadInput("no point repeats a clip, so how fast repetition wears out is unknown: give one of more passes than "
                   "its pool has clips.")
  losses = np.array([point.loss for point in points])
  lowest, spread = float(losses.min()), float(np.ptp(losses))
  if not spread > 0:
    raise BadInput("all points have the same loss: nothing was learned, or nothing was measured.")

  def law(at: np.ndarray) -> Law:
    utility, half_life, unit, scale = np.exp(at[:4]).tolist()
    return Law(utility, float(at[4]), half_life, unit, tenth, lowest - spread * math.exp(at[5]), spread * scale)

  def wrong(at: np.ndarray) -> np.ndarray:
    made = law(at)
    return (np.array([made.loss(point.low, point.high, point.passes) for point in points]) - losses) / spread

  # The valley bends: half-life and unit are started from several places.
  low, high = np.array([math.log(1e-4), math.log(.05), math.log(1e-5), math.log(.1), -2., -9.]), \
    np.array([math.log(10), math.log(1e4), math.log(100), math.log(1e3), 20., 3.])
  starts = [[math.log(.2), half_life, unit, 0., 1., -1.]
            for half_life, unit in product(np.log([1., 6., 40.]), np.log([.003, .03, .3]))]
  found = min((least_squares(wrong, start, bounds=(low, high), x_scale=1.) for start in starts), key=lambda r: r.cost)
  share = math.sqrt(2 * found.cost / len(points))
  if share > .2:
    raise BadInput(f"the points follow no such law: the best misses them by {share:.0%} of their spread; measure "
                   "longer trainings, or leave budget.points empty for the published law.")
  return law(found.x)


@dataclass(frozen=True)
class Settings:
  """passes: samples that the training will see, batch size times steps; 0 keeps every clip once. rank: measures with
  their weights, as pairs; below 0 where less is better. points: (low, high, passes, loss) of measured trainings, see
  Point. utility, fall, half_life, unit: of the law, where there are no points; see Law."""
  passes: int = 0
  rank: tuple[tuple[str, float], ...] = ()
  points: tuple[tuple[float, float, float, float], ...] = ()
  utility: float = PUBLISHED.utility
  fall: float = PUBLISHED.fall
  half_life: float = PUBLISHED.half_life
  unit: float = PUBLISHED.unit

  def __post_init__(self):
    for name in ("rank", "points"):
      object.__setattr__(self, name, tuple(tuple(row) for row in getattr(self, name)))
    if self.passes < 0:
      raise BadInput(f"budget.passes is {self.passes}: take 0 (keep all) or the samples that training will see.")
    for row in self.rank:
      if len(row) != 2 or not isinstance(row[0], str) or not isinstance(row[1], int | float) or not row[1]:
        raise BadInput(f"budget.rank has {row!r}: give pairs of a measure and its weight, not 0: ('sharpness', 1.0).")
    if self.passes and not self.rank:
      raise BadInput("budget.passes is set, but not by what clips are ranked: give budget.rank, as "
                     "(('sharpness', 1.0), ('motion', 0.5)).")
    if any(len(row) != 4 for row in self.points):
      raise BadInput("budget.points: each is (low, high, passes, loss), ranks 0 to 1, passes per ranked clip.")
    if not self.points:
      self.law()  # numbers out of range are refused before films are read
    for row in self.points:
      Point(*row)

  def law(self) -> Law:
    if self.points:
      return fit([Point(*row) for row in self.points])
    return Law(self.utility, self.fall, self.half_life, self.unit)


def score(measures: Sequence[Mapping[str, Any]], rank: Sequence[tuple[str, float]]) -> np.ndarray:
  """How good each clip is: the weighted mean of its places, 0 worst .. 1 best, by the measures it has, [clips].

  A measure that a clip lacks says nothing of it; a clip without any is -inf. Raises BadInput where no clip has one.
  """
  total, weights = np.zeros(len(measures)), np.zeros(len(measures))
  for name, weight in rank:
    values = np.array([_number(row.get(name)) for row in measures])
    there = np.isfinite(values)
    if not there.any():
      raise BadInput(f"budget.rank names {name!r}, which no clip has as a number: "
                     f"{nearest(name, {key for row in measures for key in row})}")
    places = (rankdata(np.sign(weight) * values[there]) - .5) / there.sum()
    total[there] += abs(weight) * places
    weights[there] += abs(weight)
  return np.where(weights > 0, total / np.maximum(weights, 1e-300), -np.inf)


def _number(value: Any) -> float:
  return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def select(candidates: Sequence[Candidate], settings: Settings
           ) -> tuple[list[Candidate], list[Rejected], Choice | None]:
  """The clips to train on in order of ids, those beyond the budget, and the choice; without a budget, all."""
  ordered = sorted(candidates, key=lambda candidate: candidate.shot.id)
  if not settings.passes or not ordered:
    return ordered, [], None
  scores = score([candidate.measures for candidate in ordered], settings.rank)
  choice = choose(len(ordered), settings.passes, settings.law())
  best = set(np.argsort(-scores, kind="stable")[:choice.keep].tolist())
  rejected = [Rejected(candidate.shot.id, candidate.shot.film, "budget", "beyond_budget", f"score {score_:.3f}")
              for number, (candidate, score_) in enumerate(zip(ordered, scores, strict=True)) if number not in best]
  return [candidate for number, candidate in enumerate(ordered) if number in best], rejected, choice


def lines(count: int, passes: int, law: Law) -> list[curve.Line]:
  """Loss against the number of clips kept, for a quarter of the budget, all of it and four times as much."""
  budgets = {f"{factor:g} x budget": max(1, round(passes * factor)) for factor in (.25, 1, 4)}
  choices = {name: choose(count, budget, law) for name, budget in budgets.items()}
  return [curve.Line(f"{name}: {choice.keep:,}", list(map(float, choice.sizes)), list(choice.losses), number)
          for number, (name, choice) in enumerate(choices.items())]
