"""This host's rows through a function on the mesh and back: for encoders that serve batches of any length."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from anisora_jax.parallel import mesh as meshes


def through(mesh: Mesh, work: Callable[..., jax.Array], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """What `work` makes of this host's arrays `[b, ...]`, row by row.

  b may be any number, the same on every host: rows of zeros fill the batch until it splits as a batch does, and
  leave again. Hosts that hold the same parts of a batch give the same rows. work: takes the arrays by name, as global
  arrays, and returns one array split in the same way.
  """
  b = len(next(iter(arrays.values())))
  spare = -b % len(meshes.held(mesh)[0])
  filled = {name: np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for name, x in arrays.items()}
  return meshes.from_devices(work(**meshes.to_devices(mesh, filled)))[:b]
