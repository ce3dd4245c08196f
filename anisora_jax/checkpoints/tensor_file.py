"""One safetensors file: 8 bytes with the header's length, the header in JSON, then the tensors' bytes end to end.

From: https://huggingface.co/docs/safetensors. Its library writes a file from tensors that are all in memory; ours are
larger than that, so they come and go a piece at a time. The tests hold both directions against the library.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from anisora_jax.errors import BadInput

DTYPES = {  # code in a header -> dtype
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}
DTYPES = {code: np.dtype(dtype) for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
PIECE = 2**22                 # bytes that are moved at once: a multiple of every item's size

Spec = tuple[np.dtype, tuple[int, ...]]


@runtime_checkable
class Tensor(Protocol):
  """A tensor that is not in memory yet."""

  dtype: np.dtype
  shape: tuple[int, ...]

  def view(self) -> np.ndarray:
    """The tensor, of which only what is touched need be read."""
    ...

  def pieces(self, room: memoryview) -> Iterator[memoryview]:
    """Its bytes in C order, a piece after another; room: what pieces may be read into."""
    ...


def nbytes(tensor: Tensor) -> int:
  return math.prod(tensor.shape) * tensor.dtype.itemsize


@dataclass(frozen=True)
class Stored:
  """A tensor in a file. offset: of its first byte."""

  path: Path
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]

  def view(self) -> np.ndarray:
    if not math.prod(self.shape):  # nothing cannot be mapped
      return np.zeros(self.shape, self.dtype)
    flat = np.memmap(self.path, np.uint8, "r", self.offset, (nbytes(self),))
    return np.asarray(flat).view(self.dtype).reshape(self.shape)

  def pieces(self, room: memoryview) -> Iterator[memoryview]:
    with self.path.open("rb", buffering=0) as file:
      at, end = self.offset, self.offset + nbytes(self)
      while at < end:
        # The same room for every piece: memory that is new costs more than the bytes that are read into it.
        piece = room[: min(len(room), end - at)]
        if os.preadv(file.fileno(), [piece], at) < len(piece):
          raise BadInput(f"{self.path} became shorter while it was read: leave it alone until this is done.")
        yield piece
        at += len(piece)


@dataclass(frozen=True)
class Made:
  """A tensor that a call makes."""

  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  def view(self) -> np.ndarray:
    return self.make()

  def pieces(self, room: memoryview) -> Iterator[memoryview]:
    data = np.ascontiguousarray(self.make()).reshape(-1).view(np.uint8)
    for at in range(0, data.size, len(room)):
      yield memoryview(data[at: at + len(room)])


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The array in another dtype. Raises BadInput for finite numbers that float16 does not hold."""
  with np.errstate(over="ignore"):
    made = array.astype(dtype, copy=False)
  if dtype == np.float16 and (np.isinf(made) & np.isfinite(array)).any():
    raise BadInput("some weights are beyond what float16 holds, 65504: take bfloat16.")
  return made


def _no(path: Path, why: str) -> BadInput:
  return BadInput(f"{path} is not a whole safetensors file, {why}: fetch it again.")


def _field(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
  first, last = data_offsets
  return dtype, tuple(map(int, shape)), int(first), int(last)


def read(path: Path) -> dict[str, Stored]:
  """The tensors of a file. Raises BadInput unless every byte of it is accounted for."""
  return _read(path)[0]


def metadata(path: Path) -> dict[str, str]:
  """What a file says of itself beside its tensors. Raises BadInput as `read` does."""
  return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
  with readable(path), path.open("rb") as file:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
      raise _no(path, f"its {size:,} bytes do not begin with a header")
    text = file.read(length)
  try:
    header = json.loads(text)
    about = dict(header.pop("__metadata__", {}))
    fields = {name: _field(**entry) for name, entry in header.items()}
  except (ValueError, TypeError, AttributeError):
    raise _no(path, "its header cannot be read") from None
  tensors, end = {}, 0
  for name, (code, shape, first, last) in sorted(fields.items(), key=lambda item: item[1][2:]):
    if code not in DTYPES:
      raise BadInput(f"{path}: {name} is {code}, and {', '.join(DTYPES)} can be read: take a file in one of these.")
    tensors[name] = Stored(path, 8 + length + first, DTYPES[code], shape)
    if first != end or last - first != nbytes(tensors[name]) or min(shape, default=0) < 0:
      raise _no(path, f"the place of {name} in it cannot be")
    end = last
  if size != 8 + length + end:
    raise _no(path, f"it has {size:,} bytes and its header tells of {8 + length + end:,}")
  return tensors, about


@contextmanager
def readable(path: Path) -> Iterator[None]:
  """Turns a file that cannot be read into BadInput."""
  try:
    yield
  except OSError as error:
    raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from None


def create(path: Path, specs: Mapping[str, Spec]) -> dict[str, Stored]:
  """Makes a file with room for these tensors and returns where each belongs, for `fill`. Raises OSError."""
  codes = {dtype: code for code, dtype in DTYPES.items()}
  # Wide items first, as the library has them, so that every tensor begins at a multiple of its item's size.
  ordered = sorted(specs.items(), key=lambda item: -item[1][0].itemsize)
  # Their loaders ask for "pt", though every framework's files are the same.
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (dtype, shape) in ordered:
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("xb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
  return {name: Stored(path, 8 + len(text) + header[name]["data_offsets"][0], dtype, shape)
          for name, (dtype, shape) in ordered}


def fill(place: Stored, pieces: Iterable[memoryview]) -> int:
  """Writes a tensor's bytes where it belongs and returns their CRC-32. Raises OSError."""
  crc, at = 0, place.offset
  with place.path.open("rb+", buffering=0) as file:
    for piece in pieces:
      crc = zlib.crc32(piece, crc)
      while piece:
        count = os.pwrite(file.fileno(), piece, at)
        piece, at = piece[count:], at + count
  assert at == place.offset + nbytes(place)
  return crc


def crc32(pieces: Iterable[memoryview]) -> int:
  crc = 0
  for piece in pieces:
    crc = zlib.crc32(piece, crc)
  return crc
