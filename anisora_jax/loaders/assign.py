"""Which records go to which bucket, and when each bucket has its turn.

"any": every bucket draws from all records that are long enough for it, by its weight. "fit": each record goes to one
bucket, the one that keeps most of it, and a pass over the records gives each bucket the batches that its own records
fill. So no record is lost or seen twice, and every step is one batch of one bucket on all devices: none waits for
another's clip.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from anisora_jax.errors import BadInput, pick
from anisora_jax.loaders import records, rows, video
from anisora_jax.loaders.buckets import Bucket, Schedule, Turn, parse
from anisora_jax.loaders.clips import all_short

ASSIGN = {"any": "every bucket draws from all records", "fit": "each record goes to the bucket that keeps most of it"}


@dataclass(frozen=True)
class Deal:
  """The buckets, and how records are dealt to them.

  assign: in ASSIGN. packed: the most encoded clips that share a row of a bucket; 0 for one a row, as long as the row.
  stride: pixel frames of a latent frame, which rows of several clips are measured in. Raises BadInput.
  """

  buckets: tuple[Bucket, ...]
  assign: str = "any"
  packed: int = 0
  stride: int = 1

  def __post_init__(self):
    pick(ASSIGN, self.assign, "assignment of records")
    if self.packed < 0:
      raise BadInput(f"{self.packed} clips in a row: take 0 for one clip a row, or the most that may share one.")
    if self.assign == "fit" and len({bucket.weight for bucket in self.buckets}) > 1:
      raise BadInput("buckets have weights, but with assign = 'fit' the records say how often each has its turn: leave "
                     "the weights out, or take assign = 'any'.")

  @classmethod
  def of(cls, buckets: "Deal | Sequence[Bucket] | str") -> "Deal":
    if isinstance(buckets, Deal):
      return buckets
    return cls(parse(buckets) if isinstance(buckets, str) else tuple(buckets))

  def canvas(self, bucket: Bucket) -> int:
    """Latent frames of a bucket's rows."""
    return 1 + (bucket.frames - 1) // self.stride


def fit(clips: Float[np.ndarray, "clips 3"], buckets: Sequence[Bucket]) -> Int[np.ndarray, "clips"]:
  """The bucket of each clip (frames at the wanted pace, height, width): the one that keeps most of it.

  That is the most frames times pixels of what is shown, cut out of the clip without making it larger. Where every
  bucket would, the one that enlarges least; a clip that is shorter than all goes to the shortest, which refuses it.
  """
  frames, height, width = (clips[:, None, axis] for axis in range(3))
  asked = np.array([(bucket.frames, bucket.height, bucket.width) for bucket in buckets], float)
  scale = np.minimum(height / asked[:, 1], width / asked[:, 2])
  shown = asked[:, 1] * asked[:, 2] * scale**2 / (height * width)  # share of the picture that cropping leaves
  kept = asked.prod(1) * shown
  long, large = frames >= asked[:, 0], scale >= 1
  # Ranks, the first that differs decides: long enough, not enlarged, kept most or enlarged least, shortest.
  short = np.where(long, 0, asked[:, 0])
  order = np.lexsort((np.broadcast_to(-kept, long.shape), np.where(large, 0, -scale), ~large, short, ~long), axis=-1)
  return order[:, 0]


def size(clip: Any, fps: float) -> Float[np.ndarray, "3"]:
  """(frames at `fps`, height, width) of a clip. Raises BadInput for one that does not say how large it is."""
  if not hasattr(clip, "height"):
    raise BadInput(f"{clip.id} is pictures, which do not say their size: take --config.data.assign=any.")
  return np.array([video.paced_length(clip.frames, clip.fps or fps, fps), clip.height, clip.width], float)


def sizes(source: Any, fps: float) -> Float[np.ndarray, "clips 3"]:
  """The size of every clip of a source, as of `size`. What cannot be read is 0 long. Raises BadInput."""
  if isinstance(source, records.Records):
    told = source.sizes()
    paced = [video.paced_length(int(frames), own, fps) for frames, own in told[:, :2]]
    return np.stack([paced, *told[:, 2:].T], -1).astype(float)
  found = np.ones((len(source), 3)) * (0, 1, 1)
  for number in tqdm(range(len(source)), f"sizes of the clips in {source.name}", unit="clip", delay=records.SLOW):
    with contextlib.suppress(video.Unreadable):  # it will be named when a batch wants it
      found[number] = size(source[number], fps)
  return found


def taken(sources: Sequence[Any], deal: Deal, fps: float) -> list[list[rows.Numbers]]:
  """Of each bucket: the clips of each source that it takes; of None, none. Those too short for it are not among them,
  where their lengths can be known without decoding any; what cannot be read is, and will be named. Raises BadInput."""
  if deal.assign == "fit":
    least = min(bucket.frames for bucket in deal.buckets)
    found = [sizes(source, fps) if source else np.zeros((0, 3)) for source in sources]
    best = [np.where(_short(clips[:, 0], least), -1, fit(clips, deal.buckets)) for clips in found]
    return [[np.flatnonzero(of_source == number) for of_source in best] for number in range(len(deal.buckets))]
  lengths = [sizes(source, fps)[:, 0] if isinstance(source, records.Records) and source.seconds is None else None
             for source in sources]

  def long(source: Any, frames: Float[np.ndarray, "_"] | None, bucket: Bucket) -> rows.Numbers:
    if frames is not None:
      return np.flatnonzero(~_short(frames, bucket.frames))
    return range(0 if source is None or all_short(source, bucket, fps) else len(source))

  return [[long(*one, bucket) for one in zip(sources, lengths, strict=True)] for bucket in deal.buckets]


def _short(frames: Float[np.ndarray, "clips"], asked: int) -> Bool[np.ndarray, "clips"]:
  return (frames > 0) & (frames < asked)


class Passes:
  """Global batch number -> Turn, for ever: in each pass over the records every bucket has its share, in a new order.

  counts: rows of a pass, of each bucket. The last batch of a bucket in a pass is filled up with rows of the next, which
  then has fewer left.
  """

  def __init__(self, buckets: Sequence[Bucket], counts: Sequence[Fraction], seed: int):
    for bucket, count in zip(buckets, counts, strict=True):
      if not count:
        raise BadInput(f"bucket {bucket} is the best for no record: leave it out.")
    self._buckets, self._counts, self._seed = buckets, counts, seed
    self._pass = lru_cache(maxsize=4)(self._draw)

  def _before(self, number: int) -> list[int]:
    """How many batches each bucket has in the passes before this one."""
    return [math.ceil(number * count / bucket.batch) for bucket, count in zip(self._buckets, self._counts, strict=True)]

  def _draw(self, number: int) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "t"]]:
    """(the bucket of each turn of a pass, how many batches it had before)."""
    before = self._before(number)
    counts = np.array(self._before(number + 1)) - before
    turns = np.random.default_rng([self._seed, number]).permutation(np.repeat(np.arange(len(before)), counts))
    had = np.zeros_like(turns)
    for bucket, first in enumerate(before):
      had[turns == bucket] = first + np.arange(counts[bucket])
    return turns, had

  def __getitem__(self, batch: int) -> Turn:
    rate = sum(count / bucket.batch for bucket, count in zip(self._buckets, self._counts, strict=True))
    number = math.floor(batch / rate)  # of the pass, or too high by what was rounded up
    while sum(self._before(number)) > batch:
      number -= 1
    turns, had = self._pass(number)
    place = batch - sum(self._before(number))
    return Turn(int(turns[place]), int(had[place]))


def turns(deal: Deal, counts: Sequence[Fraction], seed: int) -> Schedule | Passes:
  """Global batch number -> Turn. counts: rows of a pass, of each bucket."""
  return Schedule(deal.buckets, seed) if deal.assign == "any" else Passes(deal.buckets, counts, seed)
