"""Attention on one device: the local kernels, and a table of what each can do.

Dense and blockwise attention are one program over tiles of logits; dense takes all logits of a head as one tile.
Blockwise keeps no more than a tile of them: a running maximum and sum rebuild the softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867), and the backward pass makes the tiles again from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from anisora_jax.models import splash
from anisora_jax.models.cudnn import CUDNN
from anisora_jax.models.splash import EMPTY
from anisora_jax.parallel.ring import SAVED, Ids, Kernel, Keys, LogSum, Queries, delta_of
from anisora_jax.parallel.sight import Marks, meet, sees

HIDDEN = -1e38  # a logit that no softmax sees: so low that it weighs 0, also where nothing else is seen
F32 = {"preferred_element_type": jnp.float32}
# Sides of a blockwise tile, at most. On a CPU its logits are 1 MiB, which the cache of one core holds; elsewhere 4 MiB,
# since arrays go through slower memory and only large products keep the units for them busy.
SIDE = {"cpu": 512}
SIDE_ELSEWHERE = 1024
# What they are multiples of: units for large products take operands that are.
UNIT = {"cpu": 1}
UNIT_ELSEWHERE = 128
# How many logits are made at once, in one tile or in the tiles of several heads: on a CPU 4 MiB, else 1 GiB.
LOGITS = {"cpu": 2**20}
LOGITS_ELSEWHERE = 2**28

Side = Callable[[int], int]  # length -> side of its tiles


def _platform() -> str:
  """For which the program is made: that of the mesh inside whose shard_map it is traced, though no device be here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def whole(length: int) -> int:
  return length


def even(length: int) -> int:
  """The side of the fewest tiles that are small enough, all alike: the last one is filled up as little as can be."""
  here = _platform()
  most, unit = SIDE.get(here, SIDE_ELSEWHERE), UNIT.get(here, UNIT_ELSEWHERE)
  return -(-length // (-(-length // most) * unit)) * unit


def _by_head(work: Callable, side: Side, ids: Ids, *arrays: Array) -> tuple[Array, ...]:
  """Maps `work` over the heads of all clips: as many at once as LOGITS allows, at least one.

  arrays: [b, l, a, k], which work sees as [l, k], or [b, a, l], seen as [l]; then it gets the ids of its clip, and last
  the same for all, which tiles of keys the tiles of queries meet. What it returns comes back in the same two forms.
  """
  (b, l, a, _), s = arrays[0].shape, arrays[1].shape[1]
  met = _met(side, ids)
  if ids is None and s % side(s):  # the keys that fill the last tile up must be hidden
    ids = Marks(jnp.zeros((b, l), jnp.int32)), Marks(jnp.zeros((b, s), jnp.int32))
  if ids is not None:
    # As if they came of q: of what is known without it, JAX takes all tiles out of a loop over layers, and keeps them.
    (q, ids), others = lax.optimization_barrier((arrays[0], ids)), arrays[1:]
    arrays = q, *others
  apart = [rearrange(x, "b l a k -> (b a) l k" if x.ndim == 4 else "b a l -> (b a) l") for x in arrays]
  apart.append(jax.tree.map(lambda x: repeat(x, "b l -> (b a) l", a=a), ids))
  most = LOGITS.get(_platform(), LOGITS_ELSEWHERE) // (side(l) * side(s))
  group = max(size for size in range(1, b * a + 1) if b * a % size == 0 and size <= max(1, most))
  if group == b * a:  # a loop of one turn would only hide the work from the compiler
    done = jax.vmap(lambda *heads: work(*heads, met))(*apart)
  else:
    done = lax.map(lambda heads: work(*heads, met), tuple(apart), batch_size=group)
  return tuple(rearrange(x, "(b a) l k -> b l a k" if x.ndim == 3 else "(b a) l -> b a l", b=b) for x in done)


def _met(side: Side, ids: Ids) -> Bool[Array, "t u"] | None:
  """Which tiles of keys [u] hold something that a tile of queries [t] of any clip sees; None: it may be all."""
  if ids is None:
    return None
  queries, keys = (jax.vmap(partial(_tiles, side(x.segment.shape[1])))(x) for x in ids)
  if queries.segment.shape[1] * keys.segment.shape[1] == 1:
    return None
  queries, keys = jax.tree.map(lambda x: x[:, :, None], queries), jax.tree.map(lambda x: x[:, None], keys)
  return meet(queries, keys).any(0)


def _tiles(side: int, arrays):
  """Cuts a tree of [l, ...] to [tile, side, ...], filled up with zeros, ids with -1."""
  def cut(x):
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    pads = [(0, -len(x) % side)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pads, constant_values=fill).reshape(-1, side, *x.shape[1:])

  return jax.tree.map(cut, arrays)


def _loop(turn: Callable, carry, tiles):
  """lax.scan, but straight on when there is one tile."""
  if len(jax.tree.leaves(tiles)[0]) > 1:
    return lax.scan(turn, carry, tiles)
  carry, made = turn(carry, jax.tree.map(lambda x: x[0], tiles))
  return carry, jax.tree.map(lambda x: x[None], made)


def _logits(rows: Float[Array, "x k"], columns: Float[Array, "y k"], seen) -> Float[Array, "x y"]:
  """Before they are scaled, which costs nothing where they are exponentiated."""
  logits = jnp.einsum("xk,yk->xy", rows, columns, **F32)
  # Not where(seen, logits, HIDDEN): of that constant, too, JAX keeps an array of every tile, see `_by_head`.
  return logits if seen is None else jnp.where(seen, logits, jnp.minimum(logits, HIDDEN))


def _sees(q_ids, k_ids) -> Bool[Array, "l s"] | None:
  return None if q_ids is None else sees(q_ids, k_ids)


def _if(met, work: Callable, otherwise):
  """work(), but `otherwise` where a tile meets nothing that it sees; the other way round is not known."""
  return work() if met is None else lax.cond(met, work, lambda: otherwise)


def _fold(join: Callable, part: Callable, start, tiles):
  """The parts of all tiles joined, one after another. Of a tile, the last says whether it is met."""
  if len(jax.tree.leaves(tiles)[0]) == 1:
    return part(jax.tree.map(lambda x: x[0], tiles))

  def turn(joined, tile):
    return _if(tile[-1], lambda: join(joined, part(tile)), joined), None

  return lax.scan(turn, start, tiles)[0]


def _join(one: tuple[Array, ...], other: tuple[Array, ...], scale: float) -> tuple[Array, ...]:
  """Two parts (weighted sum of values, sum of weights, largest logit) of one softmax."""
  (o1, total1, top1), (o2, total2, top2) = one, other
  top = jnp.maximum(top1, top2)
  fade1, fade2 = jnp.exp((top1 - top) * scale), jnp.exp((top2 - top) * scale)
  return o1 * fade1[:, None] + o2 * fade2[:, None], total1 * fade1 + total2 * fade2, top


@dataclass(frozen=True)
class Tiled:
  """Attention by tiles of logits in f32. side: of tiles, from the length that they cut."""

  side: Side

  def forward(self, q: Queries, k: Keys, v: Keys, ids: Ids = None):
    def head(q, k, v, ids, met):
      (l, width), s, (q_ids, k_ids) = q.shape, len(k), ids or (None, None)
      queries, keys = (*_tiles(self.side(l), (q, q_ids)), met), _tiles(self.side(s), (k, v, k_ids))

      def row(_, tile):
        q, q_ids, met = tile

        def part(tile):
          k, v, k_ids, _ = tile
          logits = _logits(q, k, _sees(q_ids, k_ids))
          top = jnp.maximum(logits.max(-1), EMPTY)
          weights = jnp.exp((logits - top[:, None]) * width ** -0.5)
          return jnp.einsum("ls,sk->lk", weights.astype(v.dtype), v, **F32), weights.sum(-1), top

        none = jnp.zeros_like(q, jnp.float32)
        start = none, none[:, 0], jnp.full_like(none[:, 0], EMPTY)
        o, total, top = _fold(partial(_join, scale=width ** -0.5), part, start, (*keys, met))
        some = jnp.where(total == 0, 1.0, total)
        return None, (o / some[:, None], jnp.where(total == 0, EMPTY, top * width ** -0.5 + jnp.log(some)))

      _, (o, lse) = _loop(row, None, queries)
      return o.reshape(-1, width)[:l], lse.reshape(-1)[:l]

    return _by_head(head, self.side, ids, q, k, v)

  def backward(self, q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, o: Queries, do: Queries):
    def head(q, k, v, *rest):
      lse, delta, do, ids, met = rest
      (l, width), s, (q_ids, k_ids) = q.shape, len(k), ids or (None, None)
      queries = _tiles(self.side(l), (q, lse, delta, do, q_ids))
      keys = *_tiles(self.side(s), (k, v, k_ids)), None if met is None else met.T

      def column(dq, tile):
        k, v, k_ids, met = tile

        def work(carry, tile):
          (dk, dv), (q, lse, delta, do, q_ids) = carry, tile
          # [s, l]: XLA's products on a CPU are slow where they sum over the first side of a tile, here once, not twice.
          seen = None if q_ids is None else _sees(q_ids, k_ids).T
          weights = jnp.exp(_logits(k, q, seen) * width ** -0.5 - lse[None])
          dlogits = (weights * (jnp.einsum("sk,lk->sl", v, do, **F32) - delta[None])).astype(q.dtype)
          dk = dk + jnp.einsum("sl,lk->sk", dlogits, q, **F32)
          dv = dv + jnp.einsum("sl,lk->sk", weights.astype(do.dtype), do, **F32)
          return (dk, dv), jnp.einsum("sl,sk->lk", dlogits, k, **F32)

        def row(carry, tile):
          *tile, met = tile
          return _if(met, lambda: work(carry, tile), (carry, jnp.zeros_like(tile[0], jnp.float32)))

        none = jnp.zeros_like(k, jnp.float32)
        kept, dq_part = _loop(row, (none, none), (*queries, met))
        return dq + dq_part, kept

      dq, (dk, dv) = _loop(column, jnp.zeros_like(queries[0], jnp.float32), keys)
      dq, dk, dv = dq.reshape(-1, width)[:l], dk.reshape(-1, width)[:s], dv.reshape(-1, width)[:s]
      return dq * width ** -0.5, dk * width ** -0.5, dv

    return _by_head(head, self.side, ids, q, k, v, lse, delta_of(o, do), do)


DENSE, BLOCKWISE = (Kernel(tiled.forward, tiled.backward) for tiled in (Tiled(whole), Tiled(even)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernel: Kernel, name: str, q: Queries, k: Keys, v: Keys, ids: Ids = None) -> Queries:
  """Attention on one device that keeps only its output and log-sum-exp for the backward pass.

  name: by which rematerialisation policies find the two.
  """
  return kernel.forward(q, k, v, ids)[0].astype(q.dtype)


def _saving(kernel, name, q, k, v, ids):
  o, lse = kernel.forward(q, k, v, ids)
  o, lse = (checkpoint_name(x, name) for x in (o.astype(q.dtype), lse))
  return o, (q, k, v, ids, o, lse)


def _gradients(kernel, name, saved, do):
  q, k, v, ids, o, lse = saved
  grads = kernel.backward(q, k, v, ids, lse, o, do)
  return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None


attend.defvjp(_saving, _gradients)


class Local(NamedTuple):
  """A kernel and what it can do."""

  attend: Callable[..., Array]      # (q, k, v, ids, name = SAVED) -> o, all keys on one device
  block: Kernel | None = None       # one block of keys with its log-sum-exp, as a ring needs; None: it returns none
  packed: bool = True               # takes rows that clips share, and not only padding
  frames: bool = True               # takes rules of frames
  trains: bool = True               # has a backward pass
  platform: str | None = None       # the only one it runs on
  capability: float = 0.0           # the least of an NVIDIA card that it runs on
  dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
  typed: bool = True                # its types tell which mesh axes a value varies over; those of Pallas do not


def _from_blocks(block: Kernel, **limits) -> Local:
  return Local(lambda q, k, v, ids=None, name=SAVED: attend(block, name, q, k, v, ids), block, **limits)


LOCAL = {  # name in configs -> kernel
  "dense": _from_blocks(DENSE),
  "blockwise": _from_blocks(BLOCKWISE),
  "splash": _from_blocks(splash.SPLASH, platform="tpu", dtypes=("float32", "bfloat16"), typed=False,
                         frames=False),
  "cudnn": _from_blocks(CUDNN, platform="gpu", capability=8.0, dtypes=("bfloat16", "float16"), packed=False,
                        frames=False),
}
