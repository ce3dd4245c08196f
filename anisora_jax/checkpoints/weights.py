"""Named tensors out of published weight files (one file, shards with an index, a pickle without code), and onto a mesh.

Nothing is read before it is wanted, so a file may be larger than memory.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from anisora_jax.checkpoints import scaled, tensor_file
from anisora_jax.checkpoints.tensor_file import DTYPES, Made, Tensor, readable
from anisora_jax.errors import BadInput

INDEX = ".index.json"
BFLOAT16 = np.dtype(jnp.bfloat16)
PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def find(path: Path, dtype: np.dtype = BFLOAT16) -> dict[str, Tensor]:
  """The tensors of a weight file, an index, or a folder that holds one file or one index with its shards.

  dtype: of those that are stored in eight bits. Raises BadInput in one line for whatever is missing, left over, cut
  short or unsafe.
  """
  stored = _find(path)
  try:
    return scaled.widen(stored, dtype)
  except BadInput as mistake:
    raise BadInput(f"{path}: {mistake}") from None


def _find(path: Path) -> dict[str, Tensor]:
  if path.is_dir():
    path = only(path)
  if path.name.endswith(INDEX):
    return _shards(path)
  if path.suffix == ".safetensors":
    return dict(tensor_file.read(path))
  if path.suffix in PICKLES:
    return _unpickled(path)
  with readable(path), path.open("rb"):
    raise BadInput(f"{path} is of an unknown format: give a .safetensors file, an index, a {'/'.join(PICKLES)} file, "
                   "or a folder.")


def only(folder: Path) -> Path:
  """The one file of a folder that tells its weights: its index, else its safetensors file, else its pickle."""
  files = sorted(path for path in folder.iterdir() if path.is_file())
  for kind, found in [
    ("indices", [path for path in files if path.name.endswith(f".safetensors{INDEX}")]),
    ("safetensors files and no index", [path for path in files if path.suffix == ".safetensors"]),
    ("pickles", [path for path in files if path.suffix in PICKLES]),
  ]:
    if len(found) > 1:
      raise BadInput(f"{folder} holds {len(found)} {kind} ({found[0].name} ...): give the one file that is meant, or "
                     "fetch the index of the shards.")
    if found:
      return found[0]
  raise BadInput(f"{folder} holds no weights: there is no safetensors file, index or {'/'.join(PICKLES)} file in it.")


def _shards(index: Path) -> dict[str, Tensor]:
  """The tensors of the shards that an index names: each in the file it is said to be in, and no others."""
  with readable(index):
    text = index.read_text()
  try:
    where = {str(name): str(file) for name, file in json.loads(text)["weight_map"].items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise BadInput(f"{index} is not an index of shards: fetch it again.") from None
  files = {}
  for file in sorted(set(where.values())):
    if Path(file).name != file or not (index.parent / file).is_file():
      raise BadInput(f"{index.parent / file} is missing, and {index.name} names it: fetch it.")
    files[file] = tensor_file.read(index.parent / file)
  for name, file in where.items():
    if name not in files[file]:
      raise BadInput(f"{index.name} says that {name} is in {file}, where it is not: fetch both again.")
  for file, tensors in files.items():
    extra = [name for name in tensors if where.get(name) != file]
    if extra:
      raise BadInput(f"{index.name} has no entry for {extra[0]}, which is in {file}: fetch both again.")
  return {name: files[file][name] for name, file in where.items()}


def _unpickled(path: Path) -> dict[str, Tensor]:
  """The tensors of a pickle, by the loader that runs none of its code."""
  try:
    import torch  # only here: nothing else needs it
  except ImportError:
    raise BadInput(f"{path} is a pickle, and reading it safely takes torch: pip install torch, or give safetensors.") \
      from None
  try:
    with readable(path), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      # Only the present format can be mapped rather than read.
      state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except BadInput:
    raise
  except Exception as error:  # whatever it is that bytes of no pickle make the loader stumble over
    first = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:150]
    raise BadInput(f"{path} is not a pickle of tensors alone, whole and without code ({first}): get it from its "
                   "publisher as safetensors.") from None
  if not isinstance(state, Mapping) or not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
    raise BadInput(f"{path} is not one table of named tensors: give a file that holds a model's state and no more.")

  def tensor(x: torch.Tensor) -> Made:
    kind = str(x.dtype).removeprefix("torch.")
    dtype = next((dtype for dtype in DTYPES.values() if dtype.name == kind), None)
    if dtype is None:
      raise BadInput(f"{path} holds {kind} numbers, which cannot be read: give it as bfloat16, float16 or float32.")
    # numpy and torch share no bfloat16; as bytes they do.
    return Made(dtype, tuple(x.shape), lambda: x.contiguous().reshape(-1).view(torch.uint8).numpy().view(dtype)
                .reshape(tuple(x.shape)))

  return {str(name): tensor(x) for name, x in state.items()}


@runtime_checkable
class Entry(Protocol):
  """What models/names.py tells of one tensor: its name, our path, which part of our array it is, and its layouts."""

  name: str
  path: str
  at: tuple
  whole: tuple[int, ...]
  leaf: Any
  shape: tuple[int, ...]

  def torch_shape(self) -> tuple[int, ...]:
    ...


def by_path(wanted: Sequence[Entry]) -> dict[str, list[Entry]]:
  """The entries of each array of ours."""
  parts: dict[str, list[Entry]] = {}
  for entry in wanted:
    parts.setdefault(entry.path, []).append(entry)
  return parts


def renamed(tensors: Mapping[str, Tensor], here: Sequence[Entry], there: Sequence[Entry]) -> dict[str, Tensor]:
  """The tensors of table `here` as those of another naming, none of them read; in the order in which they lie."""
  parts, order = by_path(here), {name: number for number, name in enumerate(tensors)}
  made = []
  for new in there:
    old = next((old for old in parts[new.path] if old.at == new.at), None)
    if old and old.torch_shape() == new.torch_shape():
      made.append((order[old.name], new.name, tensors[old.name]))
    else:  # another layout, or parts that lie in one tensor there and in several here
      dtype = max((tensors[part.name].dtype for part in parts[new.path]), key=lambda dtype: dtype.itemsize)
      made.append((min(order[part.name] for part in parts[new.path]), new.name,
                   Made(dtype, new.torch_shape(), partial(_one, tensors, parts[new.path], new, dtype))))
  return {name: tensor for _, name, tensor in sorted(made, key=lambda one: one[0])}


def _one(tensors: Mapping[str, Tensor], parts: Sequence[Entry], wanted: Entry, dtype: np.dtype) -> np.ndarray:
  return wanted.leaf.to_torch(_part(tensors, parts, tuple(_sides(wanted)), dtype).reshape(wanted.shape))


def array(tensors: Mapping[str, Tensor], entries: Sequence[Entry], dtype: np.dtype) -> np.ndarray:
  """One whole array of ours, in memory. entries: all of it."""
  return _part(tensors, entries, tuple(range(side) for side in entries[0].whole), dtype)


def to_mesh(tensors: Mapping[str, Tensor], wanted: Sequence[Entry], abstract: PyTree,
            told: Callable[[int], None] = lambda count: None) -> PyTree:
  """Our arrays made of their tensors, placed as `abstract` says, in its dtypes; names and shapes have been checked.

  Each host reads only the parts that its devices hold, an array at a time, so the model never has to fit one host.
  abstract: a tree of jax.ShapeDtypeStruct with shardings. told: takes the bytes of each array that is done.
  """
  parts = by_path(wanted)

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    entries, made = parts[jax.tree_util.keystr(path, simple=True, separator="/")], {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
      box = tuple(range(*side.indices(length)) for side, length in zip(index, leaf.shape, strict=True))
      if box not in made:  # devices that hold the same part share one reading
        made[box] = _part(tensors, entries, box, leaf.dtype)
      return made[box]

    array = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
    told(array.nbytes)
    return array

  return jax.tree_util.tree_map_with_path(place, abstract)


def _part(tensors: Mapping[str, Tensor], entries: Sequence[Entry], box: tuple[range, ...], dtype) -> np.ndarray:
  """One part of an array of ours. box: the range along each of its dimensions."""
  out = np.empty([len(side) for side in box], dtype)
  for entry in entries:
    sides = _sides(entry)
    both = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, sides, strict=True)]
    if all(both):
      here = tuple(slice(c.start - a.start, c.stop - a.start) for a, c in zip(box, both, strict=True))
      there = tuple(slice(c.start - b.start, c.stop - b.start) for b, c in zip(sides, both, strict=True))
      # A view of the file: only the part that is asked for is read.
      view = entry.leaf.from_torch(tensors[entry.name].view())
      out[here] = view.reshape([len(side) for side in sides])[there]
  return out


def _sides(entry: Entry) -> list[range]:
  """Where a tensor lies in our array: the range along each dimension."""
  at = list(entry.at)
  if Ellipsis in at:
    fill = len(entry.whole) - (len(at) - 1)
    at[at.index(Ellipsis):at.index(Ellipsis) + 1] = [slice(None)] * fill
  at += [slice(None)] * (len(entry.whole) - len(at))
  return [range(i, i + 1) if isinstance(i, int) else range(*i.indices(n)) for i, n in zip(at, entry.whole, strict=True)]
