"""Our parameters and PyTorch's tensors, each by the other's name and layout: the engine of every family's tables.

A table has one row a layer: our path, its name in each PyTorch naming, its layout, and the shape of its kernel or
vector in our layout, in letters. Ours may stack layers on axis 0 where theirs number them, and may hold as one array
what theirs hold as several: then the row names them all, "to_q|to_k|to_v", and they lie side by side on our last axis.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from anisora_jax.errors import BadInput

Row = tuple[str, ...]  # ours, one column a naming, layout, shape letters


class Leaf(NamedTuple):
  """One array of a layer: how it ends in our path and in theirs, and its layout each way."""

  ours: str
  theirs: str
  to_torch: Callable[[np.ndarray], np.ndarray] = lambda x: x
  from_torch: Callable[[np.ndarray], np.ndarray] = lambda x: x


def leaf(ours: str, theirs: str, pattern: str, **sizes: int) -> Leaf:
  """A leaf whose layouts einops tells apart: "ours -> theirs"."""
  here, there = pattern.split("->")
  return Leaf(ours, theirs, lambda x: rearrange(x, f"{here}->{there}", **sizes),
              lambda x: rearrange(x, f"{there}->{here}", **sizes))


BIAS = Leaf("/bias", ".bias")
LAYOUTS: dict[str, tuple[Leaf, ...]] = {
  "linear": (leaf("/kernel", ".weight", "i o -> o i"), BIAS),
  "norm": (Leaf("/scale", ".weight"), BIAS),
  "scale": (Leaf("/scale", ".weight"),),
  "modulation": (leaf("", "", "s d -> 1 s d"),),
}


class Entry(NamedTuple):
  """One PyTorch tensor: its name; our path, which part of our array it is (() all) and the shape of that array; its
  layouts, and its shape in our layout."""

  name: str
  path: str
  at: tuple
  whole: tuple[int, ...]
  leaf: Leaf
  shape: tuple[int, ...]

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    """Their tensor out of our array."""
    return self.leaf.to_torch(array[self.at])

  def torch_shape(self) -> tuple[int, ...]:
    return self.leaf.to_torch(np.broadcast_to(np.float32(0), self.shape)).shape


def entries(rows: Iterable[Row], column: int, letters: Mapping[str, int], ours: str = "", theirs: str = "",
            layer: tuple[int, int] | None = None, layouts: Mapping[str, tuple[Leaf, ...]] = LAYOUTS) -> Iterator[Entry]:
  """The tensors of some rows. column: of the naming in a row; ours, theirs: what paths and names begin with.

  letters: sizes. layer: (number, of how many) where our arrays stack layers on axis 0.
  """
  stack, index = ((), ()) if layer is None else (layer[1:], layer[:1])
  for row in rows:
    sides = tuple(letters[letter] for letter in row[-1].split())
    for part in layouts[row[-2]]:
      shape = sides[-1:] if part is BIAS else sides
      names = row[column].split("|")
      step = shape[-1] // len(names)
      for number, name in enumerate(names):
        at = index if len(names) == 1 else (*index, ..., slice(number * step, (number + 1) * step))
        yield Entry(theirs + name + part.theirs, ours + row[0] + part.ours, at, stack + shape, part,
                    (*shape[:-1], step))


def table(wanted: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
  """The name and shape of every PyTorch tensor."""
  return {entry.name: entry.torch_shape() for entry in wanted}


def shapes(wanted: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
  """The path and shape of every array of ours."""
  return {entry.path: entry.whole for entry in wanted}


def refuse(strange: Sequence[str], allowed: Sequence[str], what: str) -> None:
  """Raises BadInput for names of one side that the other side lacks, with the nearest name there is."""
  if strange:
    near = get_close_matches(strange[0], allowed, n=1, cutoff=0)
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    raise BadInput(f"{what}: {strange[0]}{more}; the nearest name here is {near[0] if near else 'none'}: "
                   "check the size and the naming.")


def _compare(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], kind: str) -> None:
  refuse([name for name in got if name not in wanted], list(wanted), f"{kind} that no table row names")
  refuse([name for name in wanted if name not in got], list(got), f"missing {kind}")
  for name, shape in wanted.items():
    if tuple(got[name]) != shape:
      raise BadInput(f"{name} has shape {tuple(got[name])} and this size wants {shape}: "
                     "choose the size it was made with.")


def check_torch(got: Mapping[str, tuple[int, ...]], wanted: Iterable[Entry]) -> None:
  """Raises BadInput unless tensors of these names and shapes are exactly those of the table."""
  _compare(got, table(wanted), "tensors")


def check_ours(got: Mapping[str, tuple[int, ...]], wanted: Iterable[Entry]) -> None:
  """Raises BadInput unless arrays of these paths and shapes are exactly ours."""
  _compare(got, shapes(wanted), "parameters")


def to_torch(params: Mapping, wanted: Sequence[Entry]) -> dict[str, np.ndarray]:
  """Our parameter tree as PyTorch tensors, each in its own dtype. Raises BadInput for leftovers, gaps and shapes."""
  flat = flatten_dict(params, sep="/")
  check_ours({path: x.shape for path, x in flat.items()}, wanted)
  return {entry.name: np.ascontiguousarray(entry.to_torch(np.asarray(flat[entry.path]))) for entry in wanted}


def from_torch(tensors: Mapping[str, np.ndarray], wanted: Sequence[Entry]) -> dict:
  """PyTorch tensors as our parameter tree, each in its own dtype. Raises BadInput for leftovers, gaps and shapes."""
  check_torch({name: x.shape for name, x in tensors.items()}, wanted)
  flat: dict[str, np.ndarray] = {}
  for entry in wanted:
    tensor = np.asarray(tensors[entry.name])
    if entry.path not in flat:
      flat[entry.path] = np.empty(entry.whole, tensor.dtype)
    flat[entry.path][entry.at] = entry.leaf.from_torch(tensor)
  return unflatten_dict(flat, sep="/")
