"""The sizes we train on, and which of them each batch has.

A bucket is one shape of clip with its own batch; one step is compiled for each, so keep them few. The bucket of a batch
is a function of the batch's number and the seed alone: every host knows it without asking, and nothing needs saving.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from anisora_jax.errors import BadInput

# The schedule repeats its counts, though not its order, after so many batches; weights below 1/1000 cannot be kept.
_PERIOD = 1000
_FORM = re.compile(r"(\d+)x(\d+)x(\d+)(?:@(\d+))?(?:/(\d+))?(?::([0-9.]+))?")


@dataclass(frozen=True)
class Bucket:
  """frames, height, width: of every clip. batch: clips of all hosts together. weight: share of the batches.

  batch: 0 for as many as a budget of tokens allows; to be filled in before the bucket is of use. seq: devices that
  share the tokens of a frame of each clip; 0 for as many as the mesh says.
  """
  frames: int
  height: int
  width: int
  batch: int = 0
  weight: float = 1.
  seq: int = 0

  def __post_init__(self):
    least = min(self.frames, self.height, self.width, self.batch + 1, self.seq + 1)
    if least < 1 or not 0 < self.weight < float("inf"):
      raise BadInput(f"bucket {self} must have positive frames, height, width, batch and weight.")

  def __str__(self) -> str:
    shared = f"/{self.seq}" if self.seq else ""
    batch = f"@{self.batch}" if self.batch else ""
    return f"{self.frames}x{self.height}x{self.width}{batch}{shared}:{self.weight:g}"


def parse(text: str) -> tuple[Bucket, ...]:
  """Reads "9x32x48@16" (frames x height x width @ batch), or several with weights: "9x32x48@16:3,17x64x96@4:1".

  "81x480x832@2/4" is a batch of 2 clips, each shared by 4 devices; without "@2" a budget of tokens says how many.
  """
  buckets = []
  for word in (word.strip() for word in text.split(",")):
    match = _FORM.fullmatch(word)
    if not match:
      raise BadInput(f"bucket {word!r} is not of the form FRAMESxHEIGHTxWIDTH@BATCH, ...@BATCH/DEVICES or "
                     "...@BATCH:WEIGHT, for example 9x32x48@16.")
    *sizes, batch, seq, weight = match.groups()
    if batch == "0":
      raise BadInput(f"bucket {word!r} has no clips: write a batch of at least 1, or none for a budget of tokens.")
    try:
      buckets.append(Bucket(*map(int, sizes), batch=int(batch or 0), weight=float(weight or 1), seq=int(seq or 0)))
    except ValueError as error:
      raise BadInput(f"bucket {word!r}: {error}") from error
  return tuple(buckets)


class Turn(NamedTuple):
  """Which bucket a batch has, and how many batches that bucket had before."""
  bucket: int
  number: int


class Schedule:
  """Global batch number -> Turn, for ever. Every bucket gets its share within each period, in an order drawn anew."""

  def __init__(self, buckets: Sequence[Bucket], seed: int):
    shares = np.array([bucket.weight for bucket in buckets]) / sum(bucket.weight for bucket in buckets)
    self._period = _PERIOD if len(buckets) > 1 else 1
    counts = np.floor(shares * self._period + 1e-9).astype(int)
    # What rounding left over goes to the largest remainders.
    for bucket in np.argsort(counts - shares * self._period, kind="stable")[:self._period - counts.sum()]:
      counts[bucket] += 1
    if not counts.all():
      raise BadInput(f"bucket {buckets[int(np.argmin(counts))]} gets none of {self._period} batches: raise its weight, "
                     "or leave it out.")
    self._counts, self._seed = counts, seed

  def __getitem__(self, batch: int) -> Turn:
    period, place = divmod(batch, self._period)
    if len(self._counts) == 1:
      return Turn(0, batch)
    turns = np.repeat(np.arange(len(self._counts)), self._counts)
    order = np.random.default_rng([self._seed, period]).permutation(turns)
    bucket = int(order[place])
    return Turn(bucket, period * int(self._counts[bucket]) + int((order[:place] == bucket).sum()))
