"""Parameters alone, as Orbax stores them: written whole, read one array at a time or straight onto a mesh.

What is written here is one checkpoint with its manifest; a branch of a training state is read the same way.
"""

import threading
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from anisora_jax.checkpoints import manifest
from anisora_jax.checkpoints.orbax import leaves_by_path
from anisora_jax.checkpoints.tensor_file import Made
from anisora_jax.errors import BadInput

ITEM = "weights"


def write(folder: Path, params: PyTree) -> None:
  """Stores a tree of arrays in a new folder. Raises OSError."""
  ocp.save_checkpointables(folder.absolute(), {ITEM: {"params": params}})
  manifest.write(folder, 0)


def check(folder: Path) -> None:
  """Raises BadInput unless every byte that `write` wrote is as it was."""
  wrong = manifest.fault(folder, 0)
  if wrong:
    raise BadInput(f"{folder} is damaged: {wrong}: convert the weights again.")


def _about(folder: Path, item: str) -> PyTree:
  return ocp.checkpointables_metadata(folder.absolute()).metadata[item]


def _load(folder: Path, item: str, about: PyTree, branch: str, wanted: PyTree) -> PyTree:
  """One branch of a stored tree; a leaf `...` of wanted is not read, and nor is any other branch."""
  whole = jax.tree.map(lambda _: ..., about)
  return ocp.load_checkpointables(folder.absolute(), {item: {**whole, branch: wanted}})[item][branch]


def find(folder: Path, item: str = ITEM, branch: str = "params") -> dict[str, Made]:
  """Arrays by path, each read when it is wanted. The last one is kept, since its layers are wanted one by one.

  item, branch: which tree of the checkpoint, and which of its branches: "state" has "params" and "ema".
  """
  about = _about(folder, item)
  lock, last = threading.Lock(), {}

  def read(path: str) -> np.ndarray:
    def wanted(keys: tuple, leaf) -> object:
      here = jax.tree_util.keystr(keys, simple=True, separator="/") == path
      return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if here else ...  # numpy: into host memory

    with lock:
      if path not in last:
        last.clear()  # before the next one is there: two may be too many
        loaded = _load(folder, item, about, branch, jax.tree_util.tree_map_with_path(wanted, about[branch]))
        last[path] = leaves_by_path(loaded)[path]
      return last[path]

  return {path: Made(np.dtype(leaf.dtype), tuple(leaf.shape), lambda path=path: read(path))
          for path, leaf in leaves_by_path(about[branch]).items()}


def to_mesh(folder: Path, abstract: PyTree, item: str = ITEM, branch: str = "params") -> PyTree:
  """The arrays placed as `abstract` says, in its dtypes; each host reads what its devices hold.

  abstract: a tree of jax.ShapeDtypeStruct with shardings, whose paths and shapes are those stored.
  """
  return _load(folder, item, _about(folder, item), branch, abstract)
