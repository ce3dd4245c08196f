"""Sources, weights, shuffle, batch, prefetch: one Grain pipeline with a savable position.

The batch with global number g is a function of (sources, buckets, fps, seed, g): its bucket comes from the schedule,
its records are the next ones in the order of that bucket, and each record's first frame is drawn from the record's
place in that order. A host computes the rows that are its own and reads no other record. So the order is the same for
any number of hosts, and the position of a run is one integer, which may be restored on another number of hosts.

Within a bucket each source is shuffled anew for every epoch and goes round for ever; weights say how often each has its
turn.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets as bucket_sizes
from anisora_jax.loaders import latents, records, tfds, video
from anisora_jax.loaders.clips import Clips

POSITION = "global_next_index"
_TRIES = 8  # records in a row that may be unreadable before the source counts as broken


@dataclass(frozen=True)
class Source:
  """A folder of records, or "tfds:...", and how often it has its turn."""
  path: str
  weight: float = 1.

  def __post_init__(self):
    if not self.path or not 0 < self.weight < math.inf:
      raise BadInput(f"source {self.path!r} with weight {self.weight}: a path and a positive weight are needed, "
                     "as in DIR=0.7,DIR2=0.3")


def parse(text: str) -> tuple[Source, ...]:
  """Reads "DIR=0.7,DIR2=0.3,tfds:NAME=1"; a source without a weight has 1."""
  sources = []
  for word in (word.strip() for word in text.split(",")):
    path, equals, weight = word.rpartition("=")
    try:
      sources.append(Source(path, float(weight)) if equals else Source(word))
    except ValueError as error:
      raise error if isinstance(error, BadInput) else BadInput(
        f"source {word!r} has the weight {weight!r}, which is not a number: write DIR=0.7") from error
  return tuple(sources)


def open_source(path: str, split: str) -> records.Records | tfds.TfdsClips:
  """The clips of one split of a source. Raises BadInput."""
  if path.startswith(tfds.PREFIX):
    return tfds.TfdsClips(path.removeprefix(tfds.PREFIX), split)
  return records.Records(Path(path).expanduser(), split)


@runtime_checkable
class Rows(Protocol):
  """A source as one bucket takes it.

  row: (number of a record, generator of what is drawn for it) -> arrays by name and "caption"; raises video.Unreadable.
  """

  name: str

  def __len__(self) -> int: ...

  def row(self, number: int, draw: np.random.Generator | None) -> dict[str, Any]: ...


def serve(sources: Sequence[Source], split: str, buckets: Sequence[bucket_sizes.Bucket],
          fps: float) -> list[list[Rows]]:
  """The sources as each bucket takes them. Raises BadInput, also where clips and latents are mixed."""
  folders = [Path(source.path).expanduser() for source in sources]
  encoded = [not source.path.startswith(tfds.PREFIX) and latents.is_encoded(folder)
             for source, folder in zip(sources, folders, strict=True)]
  if all(encoded):
    return [[latents.Latents(folder, split, bucket) for folder in folders] for bucket in buckets]
  if any(encoded):
    raise BadInput(f"{folders[encoded.index(True)]} holds latents and {sources[encoded.index(False)].path} clips: "
                   "train on one kind; encode turns clips into latents.")
  opened = [open_source(source.path, split) for source in sources]
  return [[Clips(clips, bucket, fps) for clips in opened] for bucket in buckets]


class _Order:
  """Place in the order of one bucket -> (source, record), and whether the record counts."""

  def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None, seed: Sequence[int]):
    """weights: None gives every record once, source after source, and then fills up with repeats that do not count."""
    self._total, self._shuffled = sum(lengths), weights is not None
    parts = []
    for number, length in enumerate(lengths):
      part = grain.MapDataset.range(length)
      if self._shuffled:
        # Grain's shuffle of epoch e uses seed + e, so neighbouring seeds would repeat each other's epochs: spread them.
        spread = int(np.random.SeedSequence([*seed, number]).generate_state(1)[0])
        part = part.shuffle(seed=spread).repeat()
      parts.append(part.map(lambda record, number=number: (number, int(record))))
    self._places = grain.MapDataset.mix(parts, weights) if self._shuffled else grain.MapDataset.concatenate(parts)

  def __getitem__(self, place: int) -> tuple[int, int, bool]:
    number, record = self._places[place if self._shuffled else place % self._total]
    return number, record, self._shuffled or place < self._total


class _HostBatches:
  """Global batch number -> this host's rows of it. Grain reads it from several threads at once."""

  def __init__(self, served: Sequence[Sequence[Rows]], buckets: Sequence[bucket_sizes.Bucket],
               orders: Sequence[_Order], turns: Any, *, seed: int | None, shard: tuple[int, int]):
    """served: the sources as each bucket takes them. turns: global batch number -> Turn.

    seed: of what is drawn for each row; None draws nothing.
    """
    self._served, self._buckets, self._orders, self._turns = served, buckets, orders, turns
    self._seed, self._shard = seed, shard

  def __len__(self) -> int:
    return len(self._turns) if hasattr(self._turns, "__len__") else sys.maxsize

  def __getitem__(self, batch: int) -> dict[str, Any]:
    turn = self._turns[int(batch)]
    bucket, (host, hosts) = self._buckets[turn.bucket], self._shard
    rows = bucket.batch // hosts
    out: dict[str, Any] = {"caption": [], "id": np.empty(rows, np.int64), "ok": np.empty(rows, np.float32), "bad": []}
    for row in range(rows):
      place = turn.number * bucket.batch + host * rows + row
      source, record, counts = self._orders[turn.bucket][place]
      made, bad = self._row(source, record, turn.bucket, place)
      out["caption"].append(made.pop("caption"))
      for name, array in made.items():
        if row == 0:
          out[name] = np.empty((rows, *array.shape), array.dtype)
        out[name][row] = array
      out["id"][row], out["ok"][row] = source * 2**32 + record, counts and not bad
      out["bad"] += bad
    return out

  def _row(self, source: int, record: int, bucket: int, place: int) -> tuple[dict[str, Any], list]:
    """One record, or the next readable one, and what could not be read."""
    served, bad = self._served[bucket][source], []
    for step in range(min(_TRIES, len(served))):
      number = (record + step) % len(served)
      try:
        draw = None if self._seed is None else np.random.default_rng([self._seed, bucket, place])
        return served.row(number, draw), bad
      except video.Unreadable as error:
        bad.append((f"{served.name} record {number}", str(error)))
    raise BadInput(f"{len(bad)} records in a row cannot be used, the first is {bad[0][0]}: {bad[0][1]}")


class Batches(Iterator[dict[str, Any]]):
  """Batches of one split, this host's rows of each, for ever in training and once over in evaluation.

  split "train": every source goes round for ever, shuffled anew each epoch. split "held_out": every record once and in
  order, source after source, bucket after bucket, from its first frame; the last batch of a bucket is filled up with
  repeats whose "ok" is 0.

  sources, buckets: as `parse` of this file and of buckets.py read them, or their text. fps: frames a second of what is
  handed out. shard: (this host, number of hosts). threads: that decode, each a batch; 0 decodes when asked.
  Raises BadInput.

  A batch, rows b = the bucket's batch / hosts:
    of clips:   frames uint8 [b, F, H, W, 3], character bool [b, F, H, W] (the tracked one);
    of latents: latents, known float16 [b, f, h, w, c], mask bool [b, F, h, w], text [b, s, e], maybe image [b, i, y];
    of both:    caption list of b, id int64 [b] (source * 2**32 + record),
                ok float32 [b] (0 where a record could not be read and another clip stands in: drop its loss)
  """

  def __init__(self, sources: str | Sequence[Source], buckets: str | Sequence[bucket_sizes.Bucket], *, fps: float | int,
               split: str = "train", seed: int = 0, shard: tuple[int, int] = (0, 1), threads: int = 2):
    sources = parse(sources) if isinstance(sources, str) else tuple(sources)
    buckets = bucket_sizes.parse(buckets) if isinstance(buckets, str) else tuple(buckets)
    fps = float(fps)
    _check(split, fps, seed, shard, threads)
    for bucket in buckets:
      if bucket.batch % shard[1]:
        raise BadInput(f"bucket {bucket}: a batch of {bucket.batch} does not divide among {shard[1]} hosts; take a "
                       "multiple.")
    served = serve(sources, split, buckets, fps)
    train, lengths = split == "train", [[len(rows) for rows in of_bucket] for of_bucket in served]
    weights = [source.weight for source in sources] if train else None
    orders = [_Order(counts, weights, (seed, number)) for number, counts in enumerate(lengths)]
    turns = bucket_sizes.Schedule(buckets, seed) if train else [
      bucket_sizes.Turn(number, k) for number, bucket in enumerate(buckets)
      for k in range(-(-sum(lengths[number]) // bucket.batch))]
    rows = _HostBatches(served, buckets, orders, turns, seed=seed if train else None, shard=shard)
    self.length = max(map(sum, lengths))
    self.encoded = isinstance(served[0][0], latents.Latents)
    self.bad: list[tuple[str, str]] = []
    self._batches = iter(grain.MapDataset.source(rows).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))

  def __next__(self) -> dict[str, Any]:
    batch = next(self._batches)
    self.bad += batch.pop("bad")
    return batch

  @property
  def position(self) -> dict[str, int]:
    """The number of the global batch that comes next: all that a checkpoint must hold to go on exactly here."""
    return {POSITION: grain.experimental.get_next_index(self._batches)}

  def seek(self, position: dict[str, Any]) -> None:
    """Goes to a position that a Batches of the same sources, buckets, fps and seed had, on any number of hosts."""
    number = position.get(POSITION)
    if not isinstance(number, (int, np.integer)) or number < 0:
      raise BadInput(f"loader position {position!r} is not of the form {{{POSITION!r}: 12}}: the checkpoint is damaged "
                     "or not of this program.")
    grain.experimental.set_next_index(self._batches, int(number))

  def close(self) -> None:
    """Stops the threads."""
    self._batches.close()


def _check(split: str, fps: float, seed: int, shard: tuple[int, int], threads: int) -> None:
  if split not in records.SPLITS:
    raise BadInput(f"no split is named {split!r}: allowed are {', '.join(records.SPLITS)}.")
  if not 0 < fps <= 1000:
    raise BadInput(f"{fps} frames a second: allowed are more than 0 up to 1000.")
  if not 0 <= seed < 2**32:
    raise BadInput(f"the loader's seed is {seed}: allowed are 0 to {2**32 - 1}.")
  if not 0 <= shard[0] < shard[1]:
    raise BadInput(f"host {shard[0]} of {shard[1]}: hosts count from 0 to one less than their number.")
  if not 0 <= threads <= 256:
    raise BadInput(f"{threads} loader threads: allowed are 0 to 256.")
