"""Arrays that live in their host's memory and come to the device when they are wanted.

The memory is pinned: devices read and write it by themselves, while they work on something else.
"""

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from anisora_jax.errors import BadInput

HOST, DEVICE = "pinned_host", "device"  # kinds of memory, as XLA names them


def kinds(device: jax.Device) -> list[str]:
  """The kinds of memory that a device reaches."""
  return [memory.kind for memory in device.addressable_memories()]


def check(mesh: Mesh, field: str, instead: str) -> None:
  """Raises BadInput where devices have no such memory. field: what asks for it; instead: what to take."""
  device = mesh.devices.flat[0]
  there = kinds(device)
  if there and HOST not in there:  # a card that is not here tells none, and is compiled for all the same
    raise BadInput(f"{field} keeps arrays in the host's memory, which a device of kind {device.device_kind!r} does not "
                   f"reach (it has {', '.join(there)}): take {instead}.")


def on_host(shapes: PyTree, placed: PyTree) -> PyTree:
  """The same shardings, in the host's memory; but single numbers stay where they are."""
  return jax.tree.map(lambda x, sharding: sharding.with_memory_kind(HOST) if x.ndim else sharding, shapes, placed)


def lives_there(placed: NamedSharding) -> bool:
  return placed.memory_kind == HOST


def on_device(tree: PyTree) -> PyTree:
  """Arrays, copied to the device where they live on the host."""
  return jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind(DEVICE)) if lives_there(x.sharding) else x, tree)


def fetched(tree: PyTree, placed: PyTree, known: jax.Array) -> PyTree:
  """In a program: arrays placed so, on the device, brought there once `known` is, and not to lie there before."""
  def fetch(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if not lives_there(sharding):
      return x
    x, _ = lax.optimization_barrier((x, known))
    return jax.device_put(x, sharding.with_memory_kind(DEVICE))

  return jax.tree.map(fetch, tree, placed)
