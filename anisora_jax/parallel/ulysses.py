"""Ulysses attention: devices exchange heads for tokens, so that each has all tokens of a few heads.

Between the exchanges any attention of one device works, also one that returns no log-sum-exp; or a ring, when there are
more devices than heads divide by: then devices that stand together exchange, and rings join those that stand apart.
Of u devices each sends (u - 1) / u of its share for each of q, k, v and o, forward, and as much backward.
From: Jacobs et al. 2023, arXiv:2309.14509; with rings: Fang and Zhao 2024, arXiv:2405.07719.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array

from anisora_jax.parallel.ring import AllIds, Keys, Queries

Inner = Callable[[Queries, Keys, Keys, AllIds], Queries]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def exchange(x: Array, apart: int, joined: int, axes: tuple[str, ...], together: int) -> Array:
  """Cuts x along dim `apart` for the neighbours, and joins what they send along dim `joined`; inside shard_map.

  `lax.all_to_all` among groups, which may also be worked replica by replica: JAX cannot `vmap` it (0.11).
  """
  groups = np.arange(lax.axis_size(axes)).reshape(-1, together).tolist()

  @jax.custom_batching.custom_vmap
  def among_groups(x):
    return lax.all_to_all(x, axes, apart, joined, axis_index_groups=groups, tiled=True)

  @among_groups.def_vmap
  def _(_size, _batched, x):
    return exchange(x, apart + 1, joined + 1, axes, together), True

  return among_groups(x)


def _back(apart, joined, axes, together, _, do):
  return exchange(do, joined, apart, axes, together),


exchange.defvjp(lambda *args: (exchange(*args), None), _back)


def ulysses(q: Queries, k: Keys, v: Keys, ids: AllIds, axes: tuple[str, ...], together: int, inner: Inner) -> Queries:
  """Attention of q, k, v, this device's share of the tokens, by `inner`; call inside shard_map.

  ids: of the tokens of all devices of the mesh axes, whole on each; None: everything attends to everything. together:
  how many neighbours exchange; it divides them and the heads. inner: (q, k, v, ids) -> o, of all tokens of the
  neighbours and of 1 / together of the heads; its ids are those of every group of neighbours, in their order.
  """
  q, k, v = (exchange(x, 2, 1, axes, together) for x in (q, k, v))
  ids = jax.tree.map(lambda x: rearrange(x, "(r u) b l -> r b (u l)", u=together), ids)
  return exchange(inner(q, k, v, ids), 1, 2, axes, together)
