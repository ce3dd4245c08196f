"""Sources, weights, shuffle, batch, prefetch: one Grain pipeline with a savable position.

The batch with global number g is a function of (sources, buckets, fps, seed, g): its bucket comes from the schedule,
its records are the next ones in the order of that bucket, and each record's first frame is drawn from the record's
place in that order. A host computes the parts of a batch that are its own and reads no other record. So the order is
the same for any number of hosts, and the position of a run is one integer, which may be restored on another number.

Within a bucket each source is shuffled anew for every epoch and goes round for ever; weights say how often each has its
turn.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import grain
import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.loaders import assign, latents, packing, records, rows, tfds
from anisora_jax.loaders import buckets as bucket_sizes
from anisora_jax.loaders.clips import Clips, refuse_short

POSITION, BATCHES, CLIPS = "global_next_index", "batches", "clips"
Share = Callable[[bucket_sizes.Bucket], tuple[Sequence[int], int]]  # which parts of a batch are a host's, of how many


def whole(bucket: bucket_sizes.Bucket) -> tuple[Sequence[int], int]:
  """The share of a host that has all parts of each batch."""
  return [0], 1


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
  """The clips of one split of a source. Raises BadInput, also records.Empty."""
  if path.startswith(tfds.PREFIX):
    return tfds.TfdsClips(path.removeprefix(tfds.PREFIX), split)
  return records.Records(Path(path).expanduser(), split)


def open_sources(sources: Sequence[Source], split: str) -> list[records.Records | tfds.TfdsClips | None]:
  """The clips of one split of each source, None where one has none of those held out. Raises BadInput, also where none
  has any."""
  opened, empty = [], None
  for source in sources:
    try:
      opened.append(open_source(source.path, split))
    except records.Empty as mistake:
      opened, empty = [*opened, None], mistake
  if empty and (split == "train" or not any(opened)):
    raise empty
  return opened


def serve(sources: Sequence[Source], split: str, buckets: Sequence[bucket_sizes.Bucket],
          fps: float) -> list[list[rows.Source | None]]:
  """The sources as each bucket takes them, None where one has nothing for it. Raises BadInput, also where clips and
  latents are mixed."""
  folders = [Path(source.path).expanduser() for source in sources]
  encoded = [not source.path.startswith(tfds.PREFIX) and latents.is_encoded(folder)
             for source, folder in zip(sources, folders, strict=True)]
  if all(encoded):
    found = [latents.opened(folders, split, bucket) for bucket in buckets]
    for bucket, of_bucket in zip(buckets, found, strict=True):
      if not any(of_bucket) and (split == "train" or not any(map(any, found))):
        latents.Latents(folders[0], split, bucket)  # raises BadInput, which says what there is
    return found
  if any(encoded):
    raise BadInput(f"{folders[encoded.index(True)]} holds latents and {sources[encoded.index(False)].path} clips: "
                   "train on one kind; encode turns clips into latents.")
  opened = open_sources(sources, split)
  for bucket in buckets if split == "train" else []:
    refuse_short(opened, bucket, fps)
  return [[clips and Clips(clips, bucket, fps) for clips in opened] for bucket in buckets]


def clipwise(sources: Sequence[Source], split: str, deal: assign.Deal, fps: float, seed: int) -> list[rows.Clipwise]:
  """The rows of each bucket, a clip each; only of those held out a bucket may have none. Raises BadInput."""
  served, train = serve(sources, split, deal.buckets, fps), split == "train"
  weights = [source.weight for source in sources] if train else None
  if any(isinstance(source, Clips) for source in served[0]):
    taken = assign.taken([clips and clips.source for clips in served[0]], deal, fps)
  else:
    taken = [[range(len(source or ())) for source in of_bucket] for of_bucket in served]
  totals = [[len(numbers) for numbers in of_bucket] for of_bucket in taken]
  if deal.assign == "fit":
    totals = [np.sum(totals, 0).tolist()] * len(served)
  made = []
  for bucket, (of_bucket, numbers, lengths) in enumerate(zip(served, taken, totals, strict=True)):
    found = rows.parts(numbers, lengths, weights)
    if train and not found:
      raise BadInput(f"bucket {deal.buckets[bucket]} is the best for no 'train' record: leave it out."
                     if deal.assign == "fit" else f"bucket {deal.buckets[bucket]}: all 'train' clips are shorter: take "
                     "fewer frames, more fps, or longer clips.")
    count = rows.a_pass(found, lengths, weights)
    made.append(rows.Clipwise(of_bucket, found, count, (seed, bucket) if train else None))
  if not any(of_bucket.clips for of_bucket in made):
    raise BadInput(f"all {split!r} clips are shorter than every bucket: take fewer frames, more fps, or longer clips.")
  return made


def packed(sources: Sequence[Source], split: str, deal: assign.Deal,
           seed: int) -> list[packing.Packed | rows.Clipwise]:
  """The rows of each bucket, several encoded clips in each; as in `clipwise` there may be none. Raises BadInput."""
  folders = [Path(source.path).expanduser() for source in sources]
  for source, folder in zip(sources, folders, strict=True):
    if source.path.startswith(tfds.PREFIX) or not latents.is_encoded(folder):
      raise BadInput(f"{source.path} holds clips, and only latents share rows, since a codec would mix clips: encode "
                     "them, or take --config.data.packed=0.")
  found = [{size: latents.opened(folders, split, size) for size in packing.sizes(folders, split, bucket)}
           for bucket in deal.buckets]
  if deal.assign == "fit":  # each size goes to the shortest rows that hold it
    def least(size: bucket_sizes.Bucket) -> int:
      return min((bucket.frames, number) for number, bucket in enumerate(deal.buckets) if size in found[number])[1]
    found = [{size: clips for size, clips in of_bucket.items() if least(size) == number}
             for number, of_bucket in enumerate(found)]
  made = []
  for number, (bucket, of_bucket) in enumerate(zip(deal.buckets, found, strict=True)):
    if not of_bucket and split != "train" and any(found):
      made.append(rows.Clipwise([], [], Fraction(), None))
      continue
    if not of_bucket:
      raise BadInput(f"bucket {bucket}: {', '.join(map(str, folders))} hold no {split!r} latents of {bucket.height}x"
                     f"{bucket.width} and up to {bucket.frames} frames that no other bucket takes: leave it out.")
    canvas = packing.Canvas(deal.canvas(bucket), deal.packed, deal.stride)
    weights = [source.weight for source in sources] if split == "train" else None
    made.append(packing.Packed(canvas, list(of_bucket.values()), weights, (seed, number)))
  return made


class _HostBatches:
  """Global batch number -> this host's rows of it. Grain reads it from several threads at once."""

  def __init__(self, buckets: Sequence[bucket_sizes.Bucket], of_buckets: Sequence[Any], turns: Any, share: Share):
    """of_buckets: place -> (row, what could not be read), of each. turns: global batch number -> Turn."""
    self._buckets, self._rows, self._turns = buckets, of_buckets, turns
    self._shares = [share(bucket) for bucket in buckets]

  def __len__(self) -> int:
    return len(self._turns) if hasattr(self._turns, "__len__") else sys.maxsize

  def __getitem__(self, batch: int) -> dict[str, Any]:
    turn = self._turns[int(batch)]
    bucket, (own, parts) = self._buckets[turn.bucket], self._shares[turn.bucket]
    count, bad = bucket.batch // parts, []

    def row(place: int) -> dict[str, Any]:
      made, missed = self._rows[turn.bucket][turn.number * bucket.batch + place]
      bad.extend(missed)
      return made

    places = [part * count + number for part in own for number in range(count)]
    return {**rows.stacked(map(row, places), len(places)), "bad": bad}


class Batches(Iterator[dict[str, Any]]):
  """Batches of one split, this host's rows of each, for ever in training and once over in evaluation.

  split "train": every source goes round for ever, shuffled anew each epoch. split "held_out": every record once and in
  order, source after source, bucket after bucket, from its first frame; the last batch of a bucket is filled up with
  repeats whose "ok" is 0. Clips that are too short for every bucket are left out.

  sources, buckets: as `parse` of this file and of buckets.py read them, or their text; or how records are dealt to
  buckets. fps: frames a second of what is handed out. share: of this host, in the batches of a bucket. threads: that
  decode, each a batch; 0 decodes when asked. Raises BadInput.

  length: clips that come in a pass; short: those that never come. encoded: they are latents. dealt: a number that is
  the same on hosts that deal the same records. bad: names and reasons of records that could not be read, as met.

  A batch, rows b = the bucket's batch x this host's share of the parts:
    of clips:   frames uint8 [b, F, H, W, 3], character bool [b, F, H, W] (the tracked one);
    of latents: latents, known float16 [b, f, h, w, c], mask bool [b, F, h, w], text [b, s, e], maybe image [b, i, y];
    of both:    caption list of b, id int64 [b] (source * 2**32 + record),
                ok float32 [b] (0 where a record could not be read and another clip stands in: drop its loss; in
                training a clip that stands in for one that is too short counts)
  Where up to k clips share a row: caption lists of lists; id, ok [b, k], text [b, k, s, e], image [b, k, i, y]; mask
  [b, m f, h, w] with frame 0 of each clip m times, and segment int32 [b, f], as `training.packed` reads them. An id has
  2**48 times the clip's latent frames added, and is -1 where there is no clip.
  """

  def __init__(self, sources: str | Sequence[Source], buckets: str | Sequence[bucket_sizes.Bucket] | assign.Deal, *,
               fps: float | int, split: str = "train", seed: int = 0, share: Share = whole, threads: int = 2):
    sources = parse(sources) if isinstance(sources, str) else tuple(sources)
    deal, fps = assign.Deal.of(buckets), float(fps)
    _check(split, fps, seed, threads)
    for bucket in deal.buckets:
      if not bucket.batch:
        raise BadInput(f"bucket {bucket} has no batch: write ...@BATCH, as in 9x32x48@16, or give a budget of tokens.")
      parts = share(bucket)[1]
      if bucket.batch % parts:
        raise BadInput(f"bucket {bucket}: a batch of {bucket.batch} does not divide into {parts} parts: take a "
                       "multiple.")
    made = packed(sources, split, deal, seed) if deal.packed else clipwise(sources, split, deal, fps, seed)
    counts = [of_bucket.count for of_bucket in made]
    turns = assign.turns(deal, counts, seed) if split == "train" else [
      bucket_sizes.Turn(number, k) for number, bucket in enumerate(deal.buckets)
      for k in range(rows.batches(counts[number], bucket.batch))]
    read = _HostBatches(deal.buckets, made, turns, share)
    self.length = (max if deal.assign == "any" else sum)(of_bucket.clips for of_bucket in made)
    self.short = rows.left_out(made)
    self.encoded = bool(deal.packed) or not any(isinstance(source, Clips) for source in made[0].sources)
    self.dealt = zlib.crc32(repr([of_bucket.dealt for of_bucket in made]).encode())  # the same on every host
    self.bad: list[tuple[str, str]] = []
    self._sizes = [bucket.batch for bucket in deal.buckets]
    self._batches = iter(grain.MapDataset.source(read).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))

  def __next__(self) -> dict[str, Any]:
    batch = next(self._batches)
    self.bad += batch.pop("bad")
    return batch

  @property
  def position(self) -> dict[str, Any]:
    """The number of the global batch that comes next, all that a checkpoint must hold to go on exactly here; and of how
    many rows are the batches of each bucket, without which it says nothing; and how many clips come in a pass."""
    return {POSITION: grain.experimental.get_next_index(self._batches), BATCHES: self._sizes, CLIPS: self.length}

  def seek(self, position: dict[str, Any]) -> str:
    """Goes to a position that a Batches of the same sources, buckets, fps and seed had, on any number of hosts.

    Returns what is to be said where records are seen to be others than those it was among, and "" where not.
    """
    number = position.get(POSITION)
    if not isinstance(number, (int, np.integer)) or number < 0:
      raise BadInput(f"loader position {position!r} is not of the form {{{POSITION!r}: 12}}: the checkpoint is damaged "
                     "or not of this program.")
    had = position.get(BATCHES, self._sizes)  # a budget of tokens fills them as the devices allow
    if had != self._sizes:
      raise BadInput(f"the buckets' batches were of {', '.join(map(str, had))} clips and are now of "
                     f"{', '.join(map(str, self._sizes))}, so that records would be left out or come twice: go on with "
                     "as many devices and micro-batches; a run that is to change them needs "
                     f"...@{had[0]} in data.buckets at its start.")
    grain.experimental.set_next_index(self._batches, int(number))
    clips = position.get(CLIPS, self.length)
    return "" if clips == self.length else (f", among {self.length} clips where there were {clips}: records are others "
                                            "than they were, and come in another order")

  def close(self) -> None:
    """Stops the threads."""
    self._batches.close()


def _check(split: str, fps: float, seed: int, threads: int) -> None:
  if split not in records.SPLITS:
    raise BadInput(f"no split is named {split!r}: allowed are {', '.join(records.SPLITS)}.")
  if not 0 < fps <= 1000:
    raise BadInput(f"{fps} frames a second: allowed are more than 0 up to 1000.")
  if not 0 <= seed < 2**32:
    raise BadInput(f"the loader's seed is {seed}: allowed are 0 to {2**32 - 1}.")
  if not 0 <= threads <= 256:
    raise BadInput(f"{threads} loader threads: allowed are 0 to 256.")
