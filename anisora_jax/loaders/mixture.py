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
from typing import Any

import grain
import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets as bucket_sizes
from anisora_jax.loaders import records, tfds, video

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

  def __init__(self, sources: Sequence[Any], buckets: Sequence[bucket_sizes.Bucket], orders: Sequence[_Order],
               turns: Any, *, fps: float, seed: int | None, shard: tuple[int, int]):
    """turns: global batch number -> Turn. seed: of the first frame of each clip; None always takes the clip's first."""
    self._sources, self._buckets, self._orders, self._turns = sources, buckets, orders, turns
    self._fps, self._seed, self._shard = fps, seed, shard

  def __len__(self) -> int:
    return len(self._turns) if hasattr(self._turns, "__len__") else sys.maxsize

  def __getitem__(self, batch: int) -> dict[str, Any]:
    turn = self._turns[int(batch)]
    bucket, (host, hosts) = self._buckets[turn.bucket], self._shard
    rows = bucket.batch // hosts
    shape = (rows, bucket.frames, bucket.height, bucket.width)
    out = {"frames": np.empty((*shape, 3), np.uint8), "character": np.empty(shape, bool), "caption": [],
           "id": np.empty(rows, np.int64), "ok": np.empty(rows, np.float32), "bad": []}
    for row in range(rows):
      place = turn.number * bucket.batch + host * rows + row
      source, record, counts = self._orders[turn.bucket][place]
      frames, character, caption, bad = self._clip(source, record, turn.bucket, place)
      out["frames"][row], out["character"][row] = frames, character
      out["caption"].append(caption)
      out["id"][row], out["ok"][row] = source * 2**32 + record, counts and not bad
      out["bad"] += bad
    return out

  def _clip(self, source: int, record: int, bucket: int, place: int) -> tuple[np.ndarray, np.ndarray, str, list]:
    """Frames, character and caption of one record, or of the next readable one, and what could not be read."""
    clips, bad = self._sources[source], []
    for step in range(min(_TRIES, len(clips))):
      number = (record + step) % len(clips)
      try:
        clip = clips[number]
        return *self._look(clip, bucket, place), clip.caption, bad
      except video.Unreadable as error:
        bad.append((f"{clips.name} record {number}", str(error)))
    raise BadInput(f"{len(bad)} records in a row cannot be used, the first is {bad[0][0]}: {bad[0][1]}")

  def _look(self, clip: Any, bucket: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    wanted, fps = self._buckets[bucket], clip.fps or self._fps
    if video.paced_length(clip.frames, fps, self._fps) < wanted.frames:
      raise video.Unreadable(f"{clip.id} is too short: {clip.frames} frames at {fps:g} fps make fewer than "
                             f"{wanted.frames} at {self._fps:g} fps")
    span = video.pace(fps, self._fps, wanted.frames)
    spare = clip.frames - 1 - int(span[-1])
    first = 0 if self._seed is None else int(np.random.default_rng([self._seed, bucket, place]).integers(spare + 1))
    return clip.look(first + span, video.Size(wanted.height, wanted.width))


class Batches(Iterator[dict[str, Any]]):
  """Batches of one split, this host's rows of each, for ever in training and once over in evaluation.

  split "train": every source goes round for ever, shuffled anew each epoch. split "held_out": every record once and in
  order, source after source, bucket after bucket, from its first frame; the last batch of a bucket is filled up with
  repeats whose "ok" is 0.

  sources, buckets: as `parse` of this file and of buckets.py read them, or their text. fps: frames a second of what is
  handed out. shard: (this host, number of hosts). threads: that decode, each a batch; 0 decodes when asked.
  Raises BadInput.

  A batch, rows b = the bucket's batch / hosts:
    frames uint8 [b, F, H, W, 3], character bool [b, F, H, W] (the tracked one), caption list of b,
    id int64 [b] (source * 2**32 + record),
    ok float32 [b] (0 where a record could not be read and another clip stands in: drop its loss)
  """

  def __init__(self, sources: str | Sequence[Source], buckets: str | Sequence[bucket_sizes.Bucket], *, fps: float | int,
               split: str = "train", seed: int = 0, shard: tuple[int, int] = (0, 1), threads: int = 2):
    sources = parse(sources) if isinstance(sources, str) else tuple(sources)
    buckets = bucket_sizes.parse(buckets) if isinstance(buckets, str) else tuple(buckets)
    fps = float(fps)
    _check(split, fps, seed, shard, threads)
    opened = [open_source(source.path, split) for source in sources]
    for bucket in buckets:
      _check_bucket(bucket, opened, fps, shard[1])
    train, lengths = split == "train", [len(clips) for clips in opened]
    weights = [source.weight for source in sources] if train else None
    orders = [_Order(lengths, weights, (seed, number)) for number in range(len(buckets))]
    turns = bucket_sizes.Schedule(buckets, seed) if train else [
      bucket_sizes.Turn(number, k) for number, bucket in enumerate(buckets)
      for k in range(-(-sum(lengths) // bucket.batch))]
    rows = _HostBatches(opened, buckets, orders, turns, fps=fps, seed=seed if train else None, shard=shard)
    self.length = sum(lengths)
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


def _check_bucket(bucket: bucket_sizes.Bucket, sources: Sequence[Any], fps: float, hosts: int) -> None:
  """Refuses what could never be a batch."""
  if bucket.batch % hosts:
    raise BadInput(f"bucket {bucket}: a batch of {bucket.batch} does not divide among {hosts} hosts; take a multiple.")
  for clips in sources:
    held = None if clips.seconds is None else round(clips.seconds * fps)
    if held is not None and held < bucket.frames:
      raise BadInput(f"bucket {bucket} asks for {bucket.frames} frames, but clips of {clips.name} last "
                     f"{clips.seconds:g} s, {held} frames at {fps:g} fps; take fewer frames, more fps, or pack with "
                     f"--clip_seconds {math.ceil(bucket.frames / fps * 10) / 10:g} or more.")
