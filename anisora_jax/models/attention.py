"""The one entry to attention: q, k, v in, output out, by the name of a pattern and of a local kernel.

A pattern says which tokens meet and how shards talk; a kernel works one block on one device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from anisora_jax.errors import BadInput, pick
from anisora_jax.parallel.mesh import BATCH
from anisora_jax.parallel.ring import SAVED, Ids, Kernel, Keys, LogSum, Queries, ring
from anisora_jax.shapes import Heads, Segments

# How many logits the dense kernel makes at once: on a CPU what its caches hold, else 1 GiB.
LOGITS = {"cpu": 2**20}
LOGITS_ELSEWHERE = 2**28
NOTHING = -1e30  # a logit that no softmax sees; finite, so that two empty blocks merge without nan


def _by_head(work: Callable, ids: Ids, *arrays: Array) -> tuple[Array, ...]:
  """Maps `work` over the heads of all clips: as many at once as LOGITS allows, at least one.

  arrays: [b, l, a, k], which work sees as [l, k], or [b, a, l], seen as [l]; last it gets the ids of its clip. What it
  returns comes back in the same two forms.
  """
  (b, l, a, _), s = arrays[0].shape, arrays[1].shape[1]
  apart = [rearrange(x, "b l a k -> (b a) l k" if x.ndim == 4 else "b a l -> (b a) l") for x in arrays]
  apart.append(jax.tree.map(lambda x: repeat(x, "b l -> (b a) l", a=a), ids))
  most = LOGITS.get(jax.default_backend(), LOGITS_ELSEWHERE) // (l * s)
  group = max(size for size in range(1, b * a + 1) if b * a % size == 0 and size <= max(1, most))
  if group == b * a:  # a loop of one turn would only hide the work from the compiler
    done = jax.vmap(work)(*apart)
  else:
    done = lax.map(lambda heads: work(*heads), tuple(apart), batch_size=group)
  return tuple(rearrange(x, "(b a) l k -> b l a k" if x.ndim == 3 else "(b a) l -> b a l", b=b) for x in done)


def _seen(ids: tuple[Array, Array] | None):
  """[l, s]: which query may see which key; None: all."""
  if ids is None:
    return None
  queries, keys = ids[0][:, None], ids[1][None]
  return (queries == keys) & (keys >= 0)


def _logits(q: Float[Array, "l k"], k: Float[Array, "s k"], seen) -> Float[Array, "l s"]:
  logits = jnp.einsum("lk,sk->ls", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  return logits if seen is None else jnp.where(seen, logits, NOTHING)


def dense_forward(q: Queries, k: Keys, v: Keys, ids: Ids = None):
  """Softmax attention with every logit of a head in memory, in f32."""
  def head(q, k, v, ids):
    seen = _seen(ids)
    logits = _logits(q, k, seen)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top) if seen is None else jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1)
    some = jnp.where(total == 0, 1.0, total)
    o = jnp.einsum("ls,sk->lk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / some[:, None]
    return o, jnp.where(total == 0, NOTHING, top[:, 0] + jnp.log(some))

  return _by_head(head, ids, q, k, v)


def dense_backward(q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, delta: LogSum, do: Queries):
  """Gradients of `dense_forward` from the log-sum-exp over all keys, also those of other blocks."""
  f32 = {"preferred_element_type": jnp.float32}

  def head(q, k, v, lse, delta, do, ids):
    seen = _seen(ids)
    weights = jnp.exp(_logits(q, k, seen) - lse[:, None])
    weights = weights if seen is None else jnp.where(seen, weights, 0.0)
    dweights = jnp.einsum("lk,sk->ls", do, v, **f32)
    dlogits = (weights * (dweights - delta[:, None])).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    return (jnp.einsum("ls,sk->lk", dlogits, k, **f32) * scale, jnp.einsum("ls,lk->sk", dlogits, q, **f32) * scale,
            jnp.einsum("ls,lk->sk", weights.astype(do.dtype), do, **f32))

  return _by_head(head, ids, q, k, v, lse, delta, do)


DENSE = Kernel(dense_forward, dense_backward)


@jax.custom_vjp
def dense(q: Queries, k: Keys, v: Keys, ids: Ids = None) -> Queries:
  """Attention on one device that keeps only its output and log-sum-exp for the backward pass."""
  return dense_forward(q, k, v, ids)[0].astype(q.dtype)


def _dense_saving(q, k, v, ids):
  o, lse = dense_forward(q, k, v, ids)
  o, lse = (jax.ad_checkpoint.checkpoint_name(x, SAVED) for x in (o.astype(q.dtype), lse))
  return o, (q, k, v, ids, o, lse)


def _dense_gradients(saved, do):
  q, k, v, ids, o, lse = saved
  delta = jnp.einsum("blak,blak->bal", o.astype(jnp.float32), do.astype(jnp.float32))
  grads = dense_backward(q, k, v, ids, lse, delta, do)
  return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None


dense.defvjp(_dense_saving, _dense_gradients)


def cudnn(q: Queries, k: Keys, v: Keys, ids: Ids = None) -> Queries:
  """NVIDIA's fused attention: bf16 or f16, no mask."""
  if ids is not None:
    raise BadInput("the cudnn kernel takes no segment ids or padding: choose tokens that divide, or kernel 'dense'.")
  o = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  return jax.ad_checkpoint.checkpoint_name(o, SAVED)


LOCAL = {"dense": dense, "cudnn": cudnn}  # kernel on one device -> function
BLOCKS = {"dense": DENSE}                 # kernels that return their log-sum-exp, as the ring needs


def check(pattern: str, kernel: str, mesh: Mesh, heads: int, dtype: str) -> None:
  """Refuses, before anything is compiled, a pattern or kernel that cannot run here. Raises BadInput."""
  pick(PATTERNS, pattern, "attention pattern")
  pick(LOCAL, kernel, "attention kernel")
  platform = mesh.devices.flat[0].platform
  if heads % mesh.shape["tensor"]:
    raise BadInput(f"{heads} heads do not divide by mesh axis tensor = {mesh.shape['tensor']}: choose a divisor.")
  if kernel == "cudnn" and (platform != "gpu" or dtype not in ("bfloat16", "float16")):
    raise BadInput(f"kernel 'cudnn' needs a GPU and bfloat16 or float16, here {platform} and {dtype}: use 'dense'.")
  if mesh.shape["seq"] > 1 and pattern == "full":
    raise BadInput(f"pattern 'full' needs mesh axis seq = 1, got {mesh.shape['seq']}: use 'ring'.")
  if mesh.shape["seq"] > 1 and kernel not in BLOCKS:
    raise BadInput(f"kernel {kernel!r} returns no log-sum-exp, which a ring over seq = {mesh.shape['seq']} needs: "
                   f"use one of {', '.join(BLOCKS)}.")


def _over_shards(body: Callable, mesh: Mesh, q: Heads, k: Heads, v: Heads, segments: Segments | None) -> Heads:
  """Runs `body` on each device's tokens, frames flattened: attention does not care about the order of tokens."""
  def flat(q, k, v, ids):
    shape = q.shape
    q, k, v = (x.reshape(shape[0], -1, *shape[-2:]) for x in (q, k, v))
    return body(q, k, v, None if ids is None else ids.reshape(shape[0], -1)).reshape(shape)

  heads, ids = P(BATCH, None, "seq", "tensor", None), P(BATCH, None, "seq")
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, heads, heads, ids), out_specs=heads)(q, k, v, segments)


def full(q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str) -> Heads:
  """Every token sees every token of its clip; all tokens on one device."""
  def body(q, k, v, ids):
    return LOCAL[kernel](q, k, v, None if ids is None else (ids, ids))

  return _over_shards(body, mesh, q, k, v, segments)


def ringed(q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str) -> Heads:
  """Every token sees every token of its clip; tokens split over the mesh axis seq."""
  if mesh.shape["seq"] == 1:
    return full(q, k, v, segments, mesh, kernel)
  return _over_shards(partial(ring, axis="seq", kernel=BLOCKS[kernel]), mesh, q, k, v, segments)


def to_text(q: Heads, k: Float[Array, "b s a k"], v: Float[Array, "b s a k"], mesh: Mesh, kernel: str) -> Heads:
  """Cross-attention: every video token sees every text token. Text is whole on every shard, so nothing is sent."""
  def flat(q, k, v):
    k, v = (lax.pcast(x, "seq", to="varying") for x in (k, v))  # their gradients are summed over the shards
    return LOCAL[kernel](q.reshape(q.shape[0], -1, *q.shape[-2:]), k, v).reshape(q.shape)

  heads, words = P(BATCH, None, "seq", "tensor", None), P(BATCH, None, "tensor", None)
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, words, words), out_specs=heads)(q, k, v)


PATTERNS = {"full": full, "ring": ringed}  # name in configs -> function
