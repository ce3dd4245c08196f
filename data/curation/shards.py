"""Chosen clips as records to train on, and the same as a dataset of tensorflow_datasets.

OUT/SPLIT-00000-of-00004.arrayrecord and OUT/index.json are what `anisora_jax.loaders.records` reads;
OUT/tfds/clips/1.0.0 is what tfds.builder_from_directory and `tfds:FOLDER` read; OUT/clips.jsonl says of every clip
where it stands, where it comes from, under which licence, and what was measured. All is in the order of films and
frames, so it does not depend on who did the work.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records
from curation.child import Child
from curation.items import Candidate, Film
from curation.store import Store, digest, land

NAME, VERSION = "clips", "1.0.0"
TABLE, REJECTED = "clips.jsonl", "rejected.jsonl"
SPLITS = {"train": "train", "held_out": "validation"}  # our word for a split -> that of TFDS


@dataclass(frozen=True)
class Settings:
  """held_out: share of the films that is never trained on. shard_megabytes: target size of a shard. tfds: whether the
  clips are also written as a dataset of tensorflow_datasets, which takes the same space again. source, licence: of
  films that do not say."""
  held_out: float = .1
  shard_megabytes: float = 256.
  tfds: bool = True
  source: str = ""
  licence: str = "unknown"

  def __post_init__(self):
    for name, (low, high) in {"held_out": (0, .9), "shard_megabytes": (.001, 10**5)}.items():
      if not low <= getattr(self, name) <= high:
        raise BadInput(f"pack.{name} is {getattr(self, name)}: allowed are {low} to {high}.")


@dataclass(frozen=True)
class Entry:
  """One clip on its way into a shard. size: rows and columns. path: of its mp4. caption: with its suffixes."""
  film: Film
  candidate: Candidate
  size: tuple[int, int]
  path: Path
  source: str
  licence: str
  caption: str

  def clip(self) -> records.Clip:
    shot, mask = self.candidate.shot, self.path.with_suffix(".mask")
    return records.Clip(
      id=shot.id, film=self.film.name, source=self.source, licence=self.licence, caption=self.caption,
      fps=self.film.fps, frames=shot.stop - shot.start, height=self.size[0], width=self.size[1],
      motion=self.candidate.measures.get("motion"), mp4=self.path.read_bytes(),
      character=mask.read_bytes() if mask.is_file() else None)

  def row(self) -> dict:
    """What clips.jsonl says of it, besides where it stands."""
    shot = self.candidate.shot
    return {"id": shot.id, "film": self.film.name, "film_sha256": self.film.sha, "source": self.source,
            "licence": self.licence, "caption": self.caption, "start": shot.start, "stop": shot.stop, "box": shot.box,
            "opens": shot.opens, "fps": self.film.fps, "height": self.size[0], "width": self.size[1],
            "seconds": round((shot.stop - shot.start) / self.film.fps, 3), "repairs": self.film.repairs,
            "measures": self.candidate.measures, "facts": self.candidate.facts}


def features() -> tfds.features.FeaturesDict:
  """The fields of a clip in the TFDS dataset. character: b"" where none is tracked. measures: a map of JSON."""
  text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
  raw = tfds.features.Tensor(shape=(), dtype=np.object_)
  return tfds.features.FeaturesDict({
    "id": text, "film": text, "source": text, "licence": text, "caption": text, "measures": text,
    "fps": tfds.features.Scalar(np.float64), "frames": number, "height": number, "width": number,
    "mp4": raw, "character": raw})


@dataclass(frozen=True)
class Shard:
  """One file to write. tfds: in that format instead of ours."""
  path: Path
  entries: Sequence[Entry]
  tfds: bool

  def needs(self) -> str:
    return digest(self.tfds, [[entry.row(), entry.path.name] for entry in self.entries])


class Lazy(Sequence):
  """The records of a shard, each made when it is asked for."""

  def __init__(self, shard: Shard):
    self._entries, self._tfds = shard.entries, shard.tfds
    self._features = features()
    self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, number: int) -> bytes:
    entry = self._entries[number]
    clip = entry.clip()
    if not self._tfds:
      return records.to_bytes(clip)
    fields = asdict(clip) | {"character": clip.character or b"",
                             "measures": json.dumps(entry.candidate.measures, sort_keys=True)}
    fields = self._features.encode_example({name: fields[name] for name in self._features})
    # Features.serialize_example leaves the order of the fields to chance.
    return self._serializer.get_tf_example(fields).SerializeToString(deterministic=True)


def tfds_folder(out: Path) -> Path:
  return out / "tfds" / NAME / VERSION


def plan(out: Path, split: str, entries: Sequence[Entry], settings: Settings) -> list[Shard]:
  """Divides the clips of a split among shards of about the same number of clips and the target size."""
  if not entries:
    return []
  total = sum(entry.path.stat().st_size for entry in entries)
  count = min(len(entries), max(1, round(total / (settings.shard_megabytes * 2**20))))
  groups = [[entries[k] for k in chosen] for chosen in np.array_split(np.arange(len(entries)), count)]
  ours = [Shard(out / f"{split}-{n:05}-of-{count:05}.arrayrecord", group, False) for n, group in enumerate(groups)]
  theirs = [Shard(tfds_folder(out) / f"{NAME}-{SPLITS[split]}.array_record-{n:05}-of-{count:05}", group, True)
            for n, group in enumerate(groups)]
  return ours + (theirs if settings.tfds else [])


def write(shard: Shard, store: Store) -> dict:
  """Writes one shard unless it is there; returns its row for the index, with the sha256 of the file."""
  key, needs = hashlib.sha256(str(shard.path.name).encode()).hexdigest()[:24], shard.needs()
  row = store.get("shards", key, needs)
  if row is None or not shard.path.is_file() or shard.path.stat().st_size != row["bytes"]:
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    row = (records.write_shard if shard.tfds else records.write_clips)(shard.path, Lazy(shard))
    with open(shard.path, "rb") as file:
      row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    store.put("shards", key, needs, row)
  return row


def written(_: Child, shard: Shard, store: Store) -> Iterator[None]:
  """Beam's wrapper of `write`."""
  write(shard, store)
  yield from ()


def sweep(out: Path, shards: Iterable[Shard]) -> None:
  """Removes shards of another choice of clips, and what a kill left half written."""
  wanted = {shard.path for shard in shards}
  for path in chain(out.glob("*.arrayrecord"), out.glob(".*.partial"), tfds_folder(out).glob("*.array_record-*"),
                    tfds_folder(out).glob(".*.partial")):
    if path not in wanted:
      path.unlink()


def write_tfds(out: Path, rows: dict[str, list[dict]]) -> None:
  """Writes dataset_info.json and features.json. rows: split -> rows of its TFDS shards."""
  folder = tfds_folder(out)
  about = dataset_info.DatasetInfo(
    builder=dataset_info.DatasetIdentity(name=NAME, version=tfds.core.Version(VERSION), data_dir=str(folder),
                                         module_name=""),
    description="Clips of animation films, curated by anisora_jax.", features=features())
  about.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
  form = naming.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, filetype_suffix="array_record")
  about.set_splits(tfds.core.splits.SplitDict([
    tfds.core.SplitInfo(
      name=SPLITS[split], shard_lengths=[row["records"] for row in shards],
      num_bytes=sum(row["bytes"] for row in shards), filename_template=form.replace(split=SPLITS[split]))
    for split, shards in rows.items() if shards]))
  about.write_to_directory(folder)


def write_table(path: Path, rows: Iterable[dict]) -> None:
  """Writes a file of one JSON map a line."""
  land(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def statistics(entries: Sequence[Entry]) -> dict:
  """Hours, counts by licence, source, caption, size and rate, and quartiles of every measure that is a number."""
  numbers: dict[str, list[float]] = {}
  for entry in entries:
    for name, value in entry.candidate.measures.items():
      if isinstance(value, int | float) and not isinstance(value, bool):
        numbers.setdefault(name, []).append(value)
  seconds = [(entry.candidate.shot.stop - entry.candidate.shot.start) / entry.film.fps for entry in entries]
  return {
    "clips": len(entries), "films": len({entry.film.name for entry in entries}), "hours": round(sum(seconds) / 3600, 6),
    "licences": _counted(entry.licence for entry in entries), "sources": _counted(entry.source for entry in entries),
    "captions": {"by": _counted(entry.candidate.facts.get("caption_by", "none") for entry in entries),
                 "again": sum("caption_failed" in entry.candidate.facts for entry in entries)},
    "sizes": _counted(f"{entry.size[0]}x{entry.size[1]} at {entry.film.fps:g} fps" for entry in entries),
    "measures": {name: {"clips": len(values), **dict(zip(
      ("least", "quarter", "median", "three_quarters", "most"),
      np.quantile(values, [0, .25, .5, .75, 1]).round(6).tolist(), strict=True))}
      for name, values in sorted(numbers.items())}}


def _counted(words: Iterable[str]) -> dict[str, int]:
  return dict(sorted(Counter(words).items()))
