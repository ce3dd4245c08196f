"""Ring attention: every device keeps its queries while keys and values travel round the devices of a mesh axis.

Softmax over all keys is rebuilt from the partial results of the blocks (o_i, log-sum-exp_i):
  lse = log sum_i exp(lse_i),   o = sum_i exp(lse_i - lse) o_i.
The backward pass sends the gradients of a block of keys along with the block, so that they come home after one round,
while its own device works on it, last; queries never move. Transfers are issued before the block is worked on, so that
they hide behind the arithmetic, and the first of the backward pass behind what comes before it. Of r devices each sends
keys and values r - 1 times forward and r - 1 times backward, and their gradients r - 1 times, in f32 but for the last.
Both ways at once, half of every block each way, no link carries more than half of that.
From: Liu et al. 2023, arXiv:2310.01889; the partial softmax is Milakov and Gimelshein 2018, arXiv:1805.02867; both
directions of a link are used by TokenRing, Wang et al. 2024, arXiv:2412.20501.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from anisora_jax.parallel.sight import Marks, meet

SAVED = "attention"  # the name under which rematerialisation policies find the output and its log-sum-exp

Queries = Float[Array, "b l a k"]
Keys = Float[Array, "b s a k"]
LogSum = Float[Array, "b a l"]
Ids = tuple[Marks, Marks] | None  # of queries [b, l] and of keys [b, s]; None: all see all
AllIds = Ids  # of every device of a ring, in its order: [r, b, l] and [r, b, s]


class Forward(Protocol):
  """One block: (q, k, v, ids) -> (o f32, normalised within the block; natural log-sum-exp f32)."""

  def __call__(self, q: Queries, k: Keys, v: Keys, ids: Ids) -> tuple[Array, Array]: ...


class Backward(Protocol):
  """One block: (q, k, v, ids, lse, o, do) -> f32 (dq, dk, dv); lse and o are over all keys."""

  def __call__(self, q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, o: Queries,
               do: Queries) -> tuple[Array, Array, Array]: ...


class Kernel(NamedTuple):
  """Attention of local queries to one block of keys, forward and backward."""

  forward: Forward
  backward: Backward


def delta_of(o: Queries, do: Queries) -> LogSum:
  """sum(o do), which the gradient of a softmax takes from that of each of its weights."""
  return jnp.einsum("blak,blak->bal", o.astype(jnp.float32), do.astype(jnp.float32))


class Route(NamedTuple):
  """How blocks travel; its methods are called inside shard_map.

  axes: of the mesh, as one. apart: their devices that are so far apart form a ring, and there are as many rings. both:
  half of every block goes forward and half back. Two devices have but one neighbour, and one way. straight: turns are
  written out, not a loop, as simulated devices need: there collectives beside a loop, as the gathers of other weights,
  may overtake those inside on some devices and not on others, and all wait forever (jax 0.10.2).
  """

  axes: tuple[str, ...]
  apart: int = 1
  both: bool = False
  straight: bool = False

  def size(self) -> int:
    """Devices of a ring."""
    return lax.axis_size(self.axes) // self.apart

  def ways(self, length: int) -> list[tuple[int, slice]]:
    """(direction, its part of a block of so many tokens)."""
    if not self.both or self.size() == 2 or length == 1:
      return [(1, slice(None))]
    half = -(-length // 2)
    return [(1, slice(half)), (-1, slice(half, None))]

  def send(self, block: tuple[Array, ...]) -> tuple[Array, ...]:
    """Passes arrays [b, s, ...] on to the next devices."""
    devices = lax.axis_size(self.axes)

    def on(x):
      return [lax.ppermute(x[:, part], self.axes, [(i, (i + way * self.apart) % devices) for i in range(devices)])
              for way, part in self.ways(x.shape[1])]

    halves = [on(x) for x in block]
    if len(halves[0]) > 1:  # all arrive before any goes on, or XLA joins this hop of one with the next hop of another
      halves = lax.optimization_barrier(halves)
    return tuple(jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0] for parts in halves)

  def ids(self, ids: AllIds, turn: Array | int) -> Ids:
    """Of this device's queries, and of the keys that are here at that turn."""
    if ids is None:
      return None
    own, (queries, keys) = lax.axis_index(self.axes) // self.apart, ids
    parts = [jax.tree.map(lambda x: x[(own - way * turn) % self.size()][:, part], keys)  # noqa: B023, done at once
             for way, part in self.ways(keys.segment.shape[-1])]
    return jax.tree.map(lambda x: x[own], queries), jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)


def _heads_first(weight: LogSum) -> Float[Array, "b l a 1"]:
  return jnp.swapaxes(weight, 1, 2)[..., None]


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
  """Joins two partial results (o, lse) into the result over both sets of keys."""
  (o1, lse1), (o2, lse2) = one, other
  lse = jnp.logaddexp(lse1, lse2)
  return o1 * _heads_first(jnp.exp(lse1 - lse)) + o2 * _heads_first(jnp.exp(lse2 - lse)), lse


def _seen(ids: Ids, work: Callable, otherwise):
  """work(), but `otherwise` where a rule leaves a whole block unseen."""
  if ids is None or not ids[0].rule:
    return work()
  return lax.cond(meet(*ids).any(), work, lambda: otherwise)


def _forward(q, k, v, ids, route: Route, kernel: Kernel) -> tuple[Array, Array]:
  size = route.size()
  arriving = route.send((k, v)) if size > 1 else None
  result = kernel.forward(q, k, v, route.ids(ids, 0))

  def join(result, block, turn):
    there = route.ids(ids, turn)
    return _seen(there, lambda: merge(result, kernel.forward(q, *block, there)), result)

  def step(carry, turn):
    result, block = carry
    arriving = route.send(block)
    return (join(result, block, turn), arriving), None

  if size > 1:  # the last block is not passed on
    (result, block), _ = lax.scan(step, (result, arriving), jnp.arange(1, size - 1), unroll=route.straight)
    result = join(result, block, size - 1)
  return result[0].astype(q.dtype), result[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring(q: Queries, k: Keys, v: Keys, ids: AllIds, route: Route, kernel: Kernel) -> Queries:
  """Exact attention over all tokens of a ring of devices; call inside shard_map.

  q, k, v: this device's share, in which there may be more or fewer keys than queries. ids: of the tokens of all shares,
  whole on every device, since they weigh little; None: everything attends to everything. Logits are scaled by
  1/sqrt(k). Returns q's dtype.
  """
  return _forward(q, k, v, ids, route, kernel)[0]


def _ring_forward(q, k, v, ids, route, kernel):
  o, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, ids, route, kernel))
  return o, (q, k, v, ids, o, lse)


def _ring_backward(route, kernel, saved, do):
  q, k, v, ids, o, lse = saved
  size = route.size()

  def gradients(block, turn):
    there = route.ids(ids, turn)
    none = tuple(jnp.zeros_like(x, jnp.float32) for x in (q, *block))
    dq, dk, dv = _seen(there, lambda: kernel.backward(q, *block, there, lse, o, do), none)
    return dq, (dk, dv)

  def join(sums, block, turn):
    """The gradients that others found for a block follow it here, and those of this device are added."""
    dq, travelling = sums
    arrived = route.send(travelling)
    return jax.tree.map(jnp.add, (dq, arrived), gradients(block, turn))

  def step(carry, turn):
    sums, block = carry
    arriving = route.send(block)
    return (join(sums, block, turn), arriving), None

  if size == 1:
    dq, (dk, dv) = gradients((k, v), 0)
  else:
    block = route.send((k, v))
    arriving = route.send(block) if size > 2 else None
    sums = gradients(block, 1)
    if size > 2:
      (sums, block), _ = lax.scan(step, (sums, arriving), jnp.arange(2, size - 1), unroll=route.straight)
      sums = join(sums, block, size - 1)
    dq, others = sums
    others = jax.tree.map(lambda x: x.astype(k.dtype), others)  # nothing is added on the way home: it may be short
    own, others = lax.optimization_barrier(((k, v), others))  # own work begins when they leave, so that they hide
    dq, (dk, dv) = join((dq, others), own, 0)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring.defvjp(_ring_forward, _ring_backward)
