"""Where arrays live: rules on parameter paths become shardings, and a few activations are pinned.

A rule is (regular expression on the path, PartitionSpec); the first that meets a path places it. Every parameter must
be met by a rule and every rule must meet a parameter, so a renamed layer cannot quietly become replicated.
"""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from anisora_jax.errors import BadInput
from anisora_jax.parallel.mesh import BATCH, REPLICA

Leaf = jax.ShapeDtypeStruct | jax.Array | np.ndarray
Rules = Sequence[tuple[str, P]]
TOKENS = P(BATCH, "clip", "seq", None)  # [b/(data fsdp), f/clip, n/seq, d]


def path_text(path: tuple) -> str:
  """A tree path as "blocks/mlp/up/kernel"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def shardings(rules: Rules, tree: PyTree, mesh: Mesh) -> PyTree:
  """The sharding of every leaf of a parameter tree (arrays or shapes).

  Raises ValueError for a parameter without a rule or a rule without a parameter (a defect of the rules), BadInput when
  a dimension does not divide by its mesh axes (a choice of the user).
  """
  met = set()

  def place(path: tuple, leaf: Leaf) -> NamedSharding:
    name = path_text(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        met.add(pattern)
        _check(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise ValueError(f"no placement rule meets the parameter {name} {leaf.shape}: add a line to the rules.")

  placed = jax.tree_util.tree_map_with_path(place, tree)
  idle = [pattern for pattern, _ in rules if pattern not in met]
  if idle:
    raise ValueError(f"placement rules that meet no parameter: {idle}: remove or mend them.")
  return placed


def _check(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  for dim, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if dim % parts:
      raise BadInput(f"{name} {shape} cannot be split: {dim} does not divide by {' x '.join(axes)} = {parts}; "
                     "choose a smaller mesh axis or a width that divides.")


def like(state: PyTree, params: PyTree, placed: PyTree, mesh: Mesh) -> PyTree:
  """Shardings for a state whose subtrees repeat the parameters (moments, averages); all else is replicated.

  A leaf is placed as the parameter whose path ends its own path and whose shape it has.
  """
  paths = [(path_text(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
  table = dict(zip(paths, jax.tree.leaves(placed), strict=True))
  whole = NamedSharding(mesh, P())

  def place(path: tuple, leaf: Leaf) -> NamedSharding:
    parts = path_text(path).split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((table[end, leaf.shape] for end in ends if (end, leaf.shape) in table), whole)

  return jax.tree_util.tree_map_with_path(place, state)


def hold_each(tree: PyTree, placed: PyTree) -> PyTree:
  """Pins arrays [r, ...] that replicas have one each of, every one split as `placed` says."""
  return jax.tree.map(lambda x, there: hold(x, there.mesh, P(REPLICA, *there.spec)), tree, placed)


def viewed(tree: PyTree, mesh: Mesh) -> PyTree:
  """The same arrays, or shapes, with the placement that they have in another view of their mesh; nothing moves."""
  def view(x: Leaf) -> Leaf:
    placed = getattr(x, "sharding", None)
    if not isinstance(placed, NamedSharding) or placed.mesh == mesh:
      return x
    there = NamedSharding(mesh, placed.spec, memory_kind=placed.memory_kind)
    assert placed.is_equivalent_to(there, x.ndim), (placed, there)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
    return jax.make_array_from_single_device_arrays(x.shape, there, [shard.data for shard in x.addressable_shards])

  return jax.tree.map(view, tree)


def hold(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  """Pins an activation to a spec, so that the compiler's guess cannot drift from block to block."""
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
