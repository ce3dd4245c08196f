"""Rows of a batch: the order in which records come, and each as a row, or what stands in for one that is unreadable."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video

Numbers = Sequence[int] | Int[np.ndarray, "_"]
TRIES = 8  # records in a row that may be unreadable before the source counts as broken
SHORT = 1000  # ... that may be too short, where none tells its length before it is read
Bad = list[tuple[str, str]]  # what could not be read, and why


@runtime_checkable
class Source(Protocol):
  """A source as one bucket takes it.

  row: (number of a record, generator of what is drawn for it) -> arrays by name and "caption"; raises video.Unreadable.
  """

  name: str

  def __len__(self) -> int: ...

  def row(self, number: int, draw: np.random.Generator | None) -> dict[str, Any]: ...


class Part(NamedTuple):
  """Those records of a source that go one way, and how often they have their turn; weight None: once, in order."""

  source: int
  records: Numbers
  weight: Fraction | None


def dealt(found: Sequence[Part]) -> list[tuple[int, int, int]]:
  """By what hosts see that they deal the same records: (source, how many, which)."""
  return [(part.source, len(part.records), zlib.crc32(np.asarray(part.records, np.int64))) for part in found]


def parts(taken: Sequence[Numbers], lengths: Sequence[int], weights: Sequence[float] | None) -> list[Part]:
  """What each source gives of the records that are taken of it; weights: of whole sources, lengths: of these.

  A source whose records go several ways has as many turns on each as it has records there.
  """
  return [Part(number, records, None if weights is None else Fraction(weights[number]) * len(records) / lengths[number])
          for number, records in enumerate(taken) if len(records)]


def a_pass(found: Sequence[Part], lengths: Sequence[int], weights: Sequence[float] | None) -> Fraction:
  """How many turns these parts have while all sources together have as many as they have records."""
  if weights is None:
    return Fraction(sum(len(part.records) for part in found))
  held = sum((Fraction(weight) for weight, length in zip(weights, lengths, strict=True) if length), Fraction())
  return sum((part.weight for part in found), Fraction()) * sum(lengths) / held


class Turn(NamedTuple):
  """A record's turn: its place among the records of a part, and whether it counts."""

  part: Part
  place: int
  counts: bool

  @property
  def record(self) -> int:
    return int(self.part.records[self.place])


class Order:
  """Place in an order of records, from 0 on for ever -> Turn.

  With weights each part is shuffled anew for every epoch of its own and goes round for ever. Without, every record
  comes once, source after source, and then repeats that do not count.
  """

  def __init__(self, found: Sequence[Part], seed: Sequence[int]):
    self._parts, self._shuffled = found, any(part.weight is not None for part in found)
    self._total, sets = sum(len(part.records) for part in found), []
    for index, part in enumerate(found):
      numbers = grain.MapDataset.range(len(part.records))
      if self._shuffled:
        # Grain's shuffle of epoch e uses seed + e, so neighbouring seeds would repeat each other's epochs: spread them.
        spread = int(np.random.SeedSequence([*seed, part.source]).generate_state(1)[0])
        numbers = numbers.shuffle(seed=spread).repeat()
      sets.append(numbers.map(lambda number, index=index: (index, int(number))))
    self._places = (grain.MapDataset.mix(sets, [float(part.weight) for part in found]) if self._shuffled else
                    grain.MapDataset.concatenate(sets) if sets else ())

  def __getitem__(self, place: int) -> Turn:
    index, number = self._places[place if self._shuffled else place % self._total]
    return Turn(self._parts[index], number, self._shuffled or place < self._total)


def readable(source: Source, turn: Turn, seed: Sequence[int] | None) -> tuple[dict[str, Any], Bad]:
  """A record as a row with "ok", or the next readable one of its part, and what could not be read.

  ok: whether the row counts; in place of what is unreadable none does, of what is too short only one in training.
  seed: of draws; None draws nothing. Raises BadInput where several records in a row cannot be used.
  """
  bad: Bad = []
  numbers, unread = turn.part.records, 0
  for step in range(len(numbers)):
    number = int(numbers[(turn.place + step) % len(numbers)])
    try:
      made = source.row(number, None if seed is None else np.random.default_rng(seed))
      return {**made, "ok": np.float32(turn.counts and not (unread if turn.part.weight else bad))}, bad
    except video.Unreadable as error:
      bad.append((f"{source.name} record {number}", str(error)))
      unread += not isinstance(error, video.TooShort)
    if unread == TRIES or len(bad) - unread == SHORT:
      break
  way = "" if unread else ": take fewer frames, or --config.data.assign=fit, which leaves out what is too short"
  raise BadInput(f"{len(bad)} records in a row cannot be used, the first is {bad[0][0]}: {bad[0][1]}{way}")


class Clipwise:
  """One clip a row. count: rows of a pass over all records; clips: records that come; dealt: of `dealt`.

  seed: of the run and the bucket; None draws nothing.
  """

  def __init__(self, sources: Sequence[Source | None], found: Sequence[Part], count: Fraction,
               seed: Sequence[int] | None):
    self.sources, self.count, self._seed, self._order = sources, count, seed, Order(found, seed or (0,))
    self.found = found
    self.clips, self.dealt = sum(len(part.records) for part in found), dealt(found)

  def __getitem__(self, place: int) -> tuple[dict[str, Any], Bad]:
    turn = self._order[place]
    source, record = turn.part.source, turn.record
    made, bad = readable(self.sources[source], turn, self._seed and [*self._seed, place])
    return {**made, "id": np.int64(source * 2**32 + record)}, bad


def left_out(made: Sequence[Any]) -> int:
  """How many clips of the sources of `Clipwise` rows no bucket takes; of other rows none."""
  clipwise = [of_bucket for of_bucket in made if isinstance(of_bucket, Clipwise)]
  total = 0
  for number in range(len(clipwise[0].sources) if clipwise else 0):
    held = max(len(of_bucket.sources[number] or ()) for of_bucket in clipwise)
    taken = [part.records for of_bucket in clipwise for part in of_bucket.found if part.source == number]
    most = max(map(len, taken), default=0)
    total += held - (most if most == held or len(taken) < 2 else len(np.unique(np.concatenate(taken))))
  return total


def batches(rows: Fraction, batch: int) -> int:
  """How many batches so many rows fill, the last one perhaps in part."""
  return math.ceil(rows / batch)


def stacked(made: Iterable[Mapping[str, Any]], count: int) -> dict[str, Any]:
  """Rows as a batch: arrays stacked, captions in a list."""
  out: dict[str, Any] = {"caption": []}
  for number, row in enumerate(made):
    out["caption"].append(row["caption"])
    for name, array in row.items():
      if name != "caption":
        out.setdefault(name, np.empty((count, *array.shape), array.dtype))[number] = array
  return out
