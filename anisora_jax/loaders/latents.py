"""Clips that were encoded once: latents, what is given of them under some masks, text and image tokens, as records.

A folder holds SIZE-SPLIT-00000.arrayrecord files for each size of clip, FRAMESxHEIGHTxWIDTH, and one encoded.json,
which is written last: without it the folder is unfinished. Numbers are stored as float16, which keeps 11 bits: for
latents, which are normal numbers, an error of 0.0005 of each.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records, video
from anisora_jax.loaders.buckets import Bucket

INDEX = "encoded.json"
Half = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class View:
  """What is given under one mask. mask: `records.pack_mask` of bool [F, h, w]; known [f, h, w, c], image [i, y]."""

  mask: bytes
  known: bytes
  image: bytes


@dataclass(frozen=True)
class LatentClip:
  """An encoded clip; arrays are the bytes of float16. latents [f, h, w, c]; text [tokens, e], without padding."""

  id: str
  film: str
  source: str
  licence: str
  caption: str
  latents: bytes
  text: bytes
  views: tuple[View, ...]


@dataclass(frozen=True)
class Shapes:
  """Of the arrays in a record. image: (0, 0) for none; text: (tokens with padding, width)."""

  mask: tuple[int, int, int]
  latents: tuple[int, int, int, int]
  text: tuple[int, int]
  image: tuple[int, int]


def to_bytes(clip: LatentClip) -> bytes:
  return msgpack.packb(asdict(clip))


def half(x: np.ndarray) -> bytes:
  """The bytes of an array in float16. Raises BadInput for numbers that it cannot hold."""
  made = x.astype(np.float16)
  if not np.isfinite(made).all():
    raise BadInput(f"an encoder made the number {np.abs(x).max():g}, which is not finite or beyond float16: check its "
                   "weights and dtype.")
  return made.tobytes()


def size_name(bucket: Bucket) -> str:
  return f"{bucket.frames}x{bucket.height}x{bucket.width}"


def is_encoded(folder: Path) -> bool:
  return (folder / INDEX).is_file() or any(folder.glob("*x*x*-train-*.arrayrecord"))


def read_index(folder: Path) -> dict[str, Any]:
  """The index of a folder of latents. Raises BadInput where there is none."""
  path = folder / INDEX
  if not path.is_file():
    raise BadInput(f"{folder} holds no {INDEX}: encoding never finished; the same encode command goes on.")
  try:
    index = json.loads(path.read_text())
    return {**index, "empty": base64.b64decode(index["empty"]), "sizes": dict(index["sizes"])}
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f"{path} is damaged ({error!r}): encode the clips again into another folder.") from error


def write_index(folder: Path, settings: dict[str, Any], empty: Half, sizes: dict[str, Any]) -> None:
  """Finishes a folder. settings: what decided its contents. empty: text tokens [s, e] of the empty caption."""
  index = {"settings": settings, "empty": base64.b64encode(half(empty)).decode(), "sizes": sizes}
  unfinished = folder / f".{INDEX}.partial"
  unfinished.write_text(json.dumps(index, indent=2) + "\n")
  unfinished.replace(folder / INDEX)


def empty_text(index: dict[str, Any]) -> Float[np.ndarray, "s e"]:
  """Text tokens of the empty caption, padded as captions are."""
  tokens, width = next(iter(index["sizes"].values()))["shapes"]["text"]
  return _padded(index["empty"], tokens, width).astype(np.float32)


def _padded(text: bytes, tokens: int, width: int) -> Half:
  rows = np.frombuffer(text, np.float16).reshape(-1, width)
  return np.concatenate([rows, np.zeros((tokens - len(rows), width), np.float16)])


class Latents:
  """The encoded clips of one split and size. Raises BadInput where they are missing or cut short."""

  def __init__(self, folder: Path, split: str, bucket: Bucket):
    self.name, index = str(folder), read_index(folder)
    if size_name(bucket) not in index["sizes"]:
      raise BadInput(f"{folder} holds latents of {', '.join(index['sizes'])} and bucket {bucket} is none of them: take "
                     "such a bucket, or encode the clips with this config.")
    found = index["sizes"][size_name(bucket)]
    self.shapes = Shapes(**{name: tuple(sides) for name, sides in found["shapes"].items()})
    self._source, self._length = records.open_shards(folder, found["splits"][split], INDEX)
    if not self._length:
      raise BadInput(f"{folder} holds no {split!r} latents of {size_name(bucket)}: encode more or longer clips.")

  def __len__(self) -> int:
    return self._length

  def row(self, number: int, draw: np.random.Generator | None) -> dict[str, Any]:
    """The arrays of one clip under one of its views. draw: of the view; None takes them in turn, clip by clip.

    Raises video.Unreadable.
    """
    shapes = self.shapes
    try:
      clip = msgpack.unpackb(records.read(self._source, number))
      view = clip["views"][number % len(clip["views"]) if draw is None else int(draw.integers(len(clip["views"])))]
      made = {"latents": _array(clip["latents"], shapes.latents), "known": _array(view["known"], shapes.latents),
              "mask": records.unpack_mask(view["mask"], shapes.mask), "text": _padded(clip["text"], *shapes.text)}
      if shapes.image[0]:
        made["image"] = _array(view["image"], shapes.image)
      return {**made, "caption": str(clip["caption"])}
    except (ValueError, KeyError, TypeError, IndexError, msgpack.UnpackException) as error:
      raise video.Unreadable(f"not a record of latents ({error})") from error


def opened(folders: Sequence[Path], split: str, size: Bucket) -> list[Latents | None]:
  """The clips of a size, of each folder that has some. Raises BadInput."""
  def there(folder: Path) -> bool:
    about = read_index(folder)["sizes"].get(size_name(size))
    return about is not None and any(shard["records"] for shard in about["splits"][split])

  return [Latents(folder, split, size) if there(folder) else None for folder in folders]


def _array(data: bytes, shape: tuple[int, ...]) -> Half:
  return np.frombuffer(data, np.float16).reshape(shape)
