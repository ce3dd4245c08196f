"""Ring attention: every device keeps its queries while keys and values travel round a mesh axis.

Softmax over all keys is rebuilt from the partial results of the blocks (o_i, log-sum-exp_i):
  lse = log sum_i exp(lse_i),   o = sum_i exp(lse_i - lse) o_i.
The backward pass sends the gradients of a block of keys along with the block, so that they come home after one round;
queries never move. Transfers are issued before the block is worked on, so that they hide behind the arithmetic.
From: Liu et al. 2023, arXiv:2310.01889; the partial softmax is Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

SAVED = "attention"  # the name under which rematerialisation policies find the output and its log-sum-exp

Queries = Float[Array, "b l a k"]
Keys = Float[Array, "b s a k"]
LogSum = Float[Array, "b a l"]
Ids = tuple[Int[Array, "b l"], Int[Array, "b s"]] | None  # of queries and of keys; None: all see all


class Forward(Protocol):
  """One block: (q, k, v, ids) -> (o f32, normalised within the block; natural log-sum-exp f32)."""

  def __call__(self, q: Queries, k: Keys, v: Keys, ids: Ids) -> tuple[Array, Array]: ...


class Backward(Protocol):
  """One block: (q, k, v, ids, lse, delta, do) -> f32 (dq, dk, dv); lse and delta = sum(o do) are over all keys."""

  def __call__(self, q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, delta: LogSum,
               do: Queries) -> tuple[Array, Array, Array]: ...


class Kernel(NamedTuple):
  """Attention of local queries to one block of keys, forward and backward."""

  forward: Forward
  backward: Backward


def _pair(q_ids, k_ids) -> Ids:
  return None if q_ids is None else (q_ids, k_ids)


def _send(block, axis: str):
  """Passes a tree of arrays to the next device of the ring."""
  size = lax.axis_size(axis)
  return jax.tree.map(lambda x: lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]), block)


def _heads_first(weight: LogSum) -> Float[Array, "b l a 1"]:
  return jnp.swapaxes(weight, 1, 2)[..., None]


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
  """Joins two partial results (o, lse) into the result over both sets of keys."""
  (o1, lse1), (o2, lse2) = one, other
  lse = jnp.logaddexp(lse1, lse2)
  return o1 * _heads_first(jnp.exp(lse1 - lse)) + o2 * _heads_first(jnp.exp(lse2 - lse)), lse


def _forward(q, k, v, ids, axis: str, kernel: Kernel) -> tuple[Array, Array]:
  block, size = (k, v, ids), lax.axis_size(axis)
  arriving = _send(block, axis) if size > 1 else block
  result = kernel.forward(q, k, v, _pair(ids, ids))

  def turn(carry, _):
    result, block = carry
    arriving = _send(block, axis)
    return (merge(result, kernel.forward(q, block[0], block[1], _pair(ids, block[2]))), arriving), None

  if size > 1:  # the last block is not passed on
    (result, block), _ = lax.scan(turn, (result, arriving), length=size - 2)
    result = merge(result, kernel.forward(q, block[0], block[1], _pair(ids, block[2])))
  return result[0].astype(q.dtype), result[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring(q: Queries, k: Keys, v: Keys, ids: Int[Array, "b l"] | None, axis: str, kernel: Kernel) -> Queries:
  """Exact attention over all tokens of a mesh axis; call inside shard_map.

  q, k, v: this device's share. ids: tokens attend to tokens of equal id, negative ids to nothing and by nothing;
  None: everything attends to everything. Logits are scaled by 1/sqrt(k). Returns q's dtype.
  """
  return _forward(q, k, v, ids, axis, kernel)[0]


def _ring_forward(q, k, v, ids, axis, kernel):
  o, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, ids, axis, kernel))
  return o, (q, k, v, ids, o, lse)


def _ring_backward(axis, kernel, saved, do):
  q, k, v, ids, o, lse = saved
  size = lax.axis_size(axis)
  delta = jnp.einsum("blak,blak->bal", o.astype(jnp.float32), do.astype(jnp.float32))

  def gradients(block):
    dq, dk, dv = kernel.backward(q, block[0], block[1], _pair(ids, block[2]), lse, delta, do)
    return dq, (dk, dv)

  def turn(carry, _):
    dq, block, travelling = carry
    arriving, travelling = _send(block, axis), _send(travelling, axis)
    dq_part, part = gradients(block)
    return (dq + dq_part, arriving, jax.tree.map(jnp.add, travelling, part)), None

  arriving = _send((k, v, ids), axis) if size > 1 else None
  dq, travelling = gradients((k, v, ids))
  if size > 1:
    (dq, block, travelling), _ = lax.scan(turn, (dq, arriving, travelling), length=size - 2)
    travelling = _send(travelling, axis)
    dq_part, part = gradients(block)
    dq, travelling = dq + dq_part, _send(jax.tree.map(jnp.add, travelling, part), axis)  # the last hop home
  return dq.astype(q.dtype), travelling[0].astype(k.dtype), travelling[1].astype(v.dtype), None


ring.defvjp(_ring_forward, _ring_backward)
