"""One clip as one record: its fields, and folders of records on disk.

A folder of records holds SPLIT-00000-of-00004.arrayrecord files and one index.json, which is written last and names
every shard with its size, so a folder without it is unfinished, and a shard that was cut short is seen before training
starts; it tells also how long and large each clip is, so that none need be read to know which bucket it suits. A record
is one msgpack map of the fields of `Clip`. The film itself stays an mp4: 0.1-1 MB for two seconds of 480p, against
60 MB of raw pixels, and cropping, pacing and resizing happen anew at every reading.
"""

import base64
import contextlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video

SPLITS = ("train", "held_out")
INDEX = "index.json"
# One record a group: with larger groups every random read decompresses its neighbours too.
_OPTIONS = "group_size:1"
Sizes = Float[np.ndarray, "clips 4"]  # frames, frames a second, height, width; 0 frames where a record is unreadable
SLOW = 2  # seconds after which a bar is shown


@dataclass(frozen=True)
class Clip:
  """A short piece of one shot.

  id: film and first frame, "NAME.mp4/000048".  fps, frames, height, width: of the mp4.  motion: mean length of the
  optical flow in widths of the picture per frame, None if not measured.  mp4: H.264 that decodes alone.  character: the
  pixels of the tracked character, `pack_mask` of bool [frames, height, width], None where none is tracked.
  """
  id: str
  film: str
  source: str
  licence: str
  caption: str
  fps: float
  frames: int
  height: int
  width: int
  motion: float | None
  mp4: bytes
  character: bytes | None

  def __post_init__(self):
    if not (self.fps > 0 and self.frames > 0 and self.height > 0 and self.width > 0):
      raise video.Unreadable(f"a record of {self.frames} frames of {self.height}x{self.width} at {self.fps} fps")

  def look(self, indices: Int[np.ndarray, "F"], size: video.Size) -> tuple[video.Frames, Bool[np.ndarray, "F H W"]]:
    """Chosen frames, scaled and cropped to `size`, and the tracked character on them. Raises video.Unreadable."""
    frames = video.frames(self.mp4, indices, size)
    if self.character is None:
      return frames, np.zeros(frames.shape[:3], bool)
    whole = unpack_mask(self.character, (self.frames, self.height, self.width))
    return frames, np.stack([video.fit_mask(whole[i], size) for i in indices])


def to_bytes(clip: Clip) -> bytes:
  return msgpack.packb(asdict(clip))


def from_bytes(record: bytes) -> Clip:
  """Raises video.Unreadable where the bytes are not a record."""
  try:
    return Clip(**msgpack.unpackb(record))
  except (ValueError, TypeError, msgpack.UnpackException) as error:
    raise video.Unreadable(f"not a clip record ({error})") from error


def pack_mask(mask: Bool[np.ndarray, "F H W"]) -> bytes:
  return zlib.compress(np.packbits(mask).tobytes(), 6)


def unpack_mask(packed: bytes, shape: tuple[int, int, int]) -> Bool[np.ndarray, "F H W"]:
  try:
    bits = np.frombuffer(zlib.decompress(packed), np.uint8)
  except zlib.error as error:
    raise video.Unreadable(f"the character's mask is damaged ({error})") from error
  if len(bits) != -(-math.prod(shape) // 8):
    raise video.Unreadable(f"the character's mask has {len(bits)} bytes, which is not a mask of {shape}")
  return np.unpackbits(bits, count=math.prod(shape)).reshape(shape).astype(bool)


def write_shard(path: Path, records: Iterable[bytes]) -> dict:
  """Writes one ArrayRecord file under a temporary name, then renames it; returns its row for the index.

  Raises BadInput where the disk is full or refuses.
  """
  unfinished, count = path.with_name(f".{path.name}.partial"), 0
  try:
    writer = ArrayRecordWriter(str(unfinished), _OPTIONS)
    for record in records:
      writer.write(record)
      count += 1
    writer.close()
  except RuntimeError as error:
    raise BadInput(f"cannot write {path} ({' '.join(str(error).split())}): make room and run again, what is finished "
                   "is kept.") from error
  unfinished.replace(path)
  return {"name": path.name, "records": count, "bytes": path.stat().st_size}


def write_clips(path: Path, records: Iterable[bytes]) -> dict:
  """`write_shard` of records of clips, whose sizes its row then tells. Raises video.Unreadable too."""
  found = []

  def measured() -> Iterator[bytes]:
    for record in records:
      found.append(size_of(from_bytes(record)))
      yield record

  row = write_shard(path, measured())
  return {**row, "sizes": base64.b64encode(zlib.compress(np.array(found, "<f8").tobytes())).decode()}


def size_of(clip: Clip) -> tuple:
  """As in `Sizes`."""
  return clip.frames, clip.fps, clip.height, clip.width


def read_sizes(shard: dict) -> Sizes | None:
  """What a shard's row tells of its clips; None in those of earlier versions. Raises BadInput."""
  if "sizes" not in shard:
    return None
  try:
    return np.frombuffer(zlib.decompress(base64.b64decode(shard["sizes"])), "<f8").reshape(shard["records"], 4)
  except (ValueError, TypeError, zlib.error) as error:
    raise BadInput(f"{INDEX} is damaged where it tells of {shard['name']} ({error}): pack the films again.") from error


def write_shards(folder: Path, split: str, parts: Sequence[tuple[Path, range]], shard_bytes: int) -> list[dict]:
  """Copies records from part files into numbered shards of about `shard_bytes`, in the order given.

  parts: (ArrayRecord file, which of its records). Returns the shards' rows for the index.
  """
  total = sum(path.stat().st_size for path, _ in parts)
  shards = max(1, round(total / shard_bytes))
  where = [(path, number) for path, numbers in parts for number in numbers]
  sources = {path: ArrayRecordDataSource(str(path)) for path, numbers in parts if numbers}
  rows = []
  for shard, chosen in enumerate(np.array_split(np.arange(len(where)), shards)):
    name = f"{split}-{shard:05}-of-{shards:05}.arrayrecord"
    rows.append(write_clips(folder / name, [sources[where[k][0]][where[k][1]] for k in chosen]))
  return rows


def read_index(folder: Path) -> dict:
  """The index of a folder of records. Raises BadInput where there is none."""
  path = folder / INDEX
  if not path.is_file():
    what = "it holds no index.json, so packing never finished" if folder.is_dir() else "there is no such folder"
    raise BadInput(f"no records in {folder}: {what}; make them with python data/pack.py --films FILMS --out {folder}")
  try:
    index = json.loads(path.read_text())
    return {**index, "splits": {split: list(index["splits"][split]["shards"]) for split in SPLITS}}
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f"{path} is damaged ({error!r}): pack the films again into another folder.") from error


def count(folder: Path, split: str) -> int:
  """How many records a split of a folder holds. Raises BadInput where there is no index."""
  return sum(shard["records"] for shard in read_index(folder)["splits"][split])


def open_shards(folder: Path, shards: Sequence[dict], index: str) -> tuple[ArrayRecordDataSource | None, int]:
  """(the records of some shards by number, their count). shards: their rows of the file `index`.

  Raises BadInput where one is missing, cut short or, as far as that is seen here, damaged.
  """
  for shard in shards:
    path = folder / shard["name"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
      raise BadInput(f"{path} {'is missing' if size is None else f'has {size} bytes'}: {index} says {shard['bytes']} "
                     "bytes; copy the folder again, or make it anew.")
  full = [str(folder / shard["name"]) for shard in shards if shard["records"]]
  try:
    return ArrayRecordDataSource(full) if full else None, sum(shard["records"] for shard in shards)
  except (RuntimeError, ValueError) as error:
    raise BadInput(f"{folder}: a shard is damaged ({' '.join(str(error).split())[:300]}): copy the folder again, or "
                   "make it anew.") from error


def read(source: ArrayRecordDataSource, number: int) -> bytes:
  """The bytes of one record. Raises video.Unreadable where the shard is damaged."""
  try:
    return source[int(number)]
  except (ValueError, RuntimeError, IndexError, OSError) as error:
    raise video.Unreadable(f"the shard is damaged here ({' '.join(str(error).split())})") from error


class Empty(BadInput):
  """A source has no records of a split."""


class Records:
  """The records of one split of a folder, by number: `records[i]` is a Clip.

  seconds: how long every clip lasts, None where they differ. Raises BadInput where shards are missing or cut short, and
  Empty where the split has none; `records[i]` raises video.Unreadable where a record is damaged.
  """

  def __init__(self, folder: Path, split: str):
    index = read_index(folder)
    self.name, self.seconds = str(folder), None if index["clip_seconds"] is None else float(index["clip_seconds"])
    self._shards = index["splits"][split]
    self._source, self._length = open_shards(folder, self._shards, INDEX)
    if not self._length:
      raise Empty(f"{folder} holds no {split!r} records: pack more or longer films, or a larger --held_out share.")

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, number: int) -> Clip:
    return from_bytes(read(self._source, number))

  def sizes(self) -> Sizes:
    """Of every clip; from the index, or where it is of an earlier version by reading them all. Raises BadInput."""
    told = [read_sizes(shard) for shard in self._shards if shard["records"]]
    if all(one is not None for one in told):
      return np.concatenate(told)
    found = np.ones((len(self), 4)) * (0, 1, 1, 1)
    for number in tqdm(range(len(self)), f"sizes of the clips in {self.name}", unit="clip", delay=SLOW):
      with contextlib.suppress(video.Unreadable):  # it will be named when a batch wants it
        found[number] = size_of(self[number])
    return found
