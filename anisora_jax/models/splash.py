"""Splash attention, JAX's Pallas kernel for TPUs, as a block of a ring: forward, and backward from a log-sum-exp over
all keys, for which JAX has functions but no public name (the same in 0.10 and 0.11; the tests would see them change).

What a block returns is rounded to the inputs' type before blocks are added up. So is q when it is scaled, which the
kernel leaves to its caller: in bf16 that costs nothing where the width is a power of 4, and elsewhere, as at 128, up to
2^-9 of each number, since 1/sqrt(width) is no power of two.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float

from anisora_jax.errors import BadInput
from anisora_jax.parallel.ring import Ids, Kernel, Keys, LogSum, Queries, delta_of

EMPTY = -1e29      # the log-sum-exp of a query that sees nothing; finite, so that two empty blocks merge without nan
LANES = 128        # sides of tiles are multiples of it
SIDE = 512         # of a tile, at most
INTERPRET = False  # tests run the kernel without a TPU
ALL = MaskInfo(None, None, None, None, None)  # besides ids, nothing is hidden
LAYOUT = {f"{name}_layout": pallas.QKVLayout.HEAD_DIM_MINOR for name in "qkv"}


def _side(length: int) -> int:
  """Of the fewest tiles that are small enough."""
  return -(-length // (-(-length // SIDE) * LANES)) * LANES


def _fill(x: Array, dim: int, value: int = 0) -> Array:
  """Fills one dim up to whole tiles."""
  spare = -x.shape[dim] % _side(x.shape[dim])
  return jnp.pad(x, [(0, spare if at == dim else 0) for at in range(x.ndim)], constant_values=value)


def _heads(x: Float[Array, "b l a k"]) -> Float[Array, "b a t k"]:
  return _fill(jnp.swapaxes(x, 1, 2), 2)


def _tokens(x: Float[Array, "b a t k"], length: int) -> Float[Array, "b l a k"]:
  return jnp.swapaxes(x, 1, 2)[:, :length].astype(jnp.float32)


def _segments(ids: Ids, b: int, l: int, s: int) -> pallas.SegmentIds | None:
  """Ids as splash takes them, which lets all equal ones meet: negative ones differ between queries and keys."""
  if ids is None and s % _side(s) == 0:
    return None
  if ids and ids[0].rule:
    raise BadInput("kernel 'splash' hides no frames: choose mask 'all', or kernel 'blockwise'.")
  queries, keys = (x.segment for x in ids) if ids else (jnp.zeros((b, l), jnp.int32), jnp.zeros((b, s), jnp.int32))
  return pallas.SegmentIds(_fill(jnp.where(queries < 0, -2, queries), 1, -2), _fill(jnp.maximum(keys, -1), 1, -1))


def _options() -> dict:
  return {"is_mqa": False, "mask_value": pallas.DEFAULT_MASK_VALUE, "mask_function": None,
          "attn_logits_soft_cap": None, "interpret": INTERPRET}


def _forward(q: Queries, k: Keys, v: Keys, ids: Ids = None):
  (b, l, _, width), s = q.shape, k.shape[1]
  work = partial(pallas._splash_attention_forward, ALL, sinks=None, residual_checkpoint_name=None, save_residuals=True,
                 block_sizes=pallas.BlockSizes(block_q=_side(l), block_kv=_side(s)), **_options())
  o, (lse,) = jax.vmap(lambda q, k, v, ids: work(q, k, v, ids))(
    _heads(q * width ** -0.5), _heads(k), _heads(v), _segments(ids, b, l, s))
  o, lse = _tokens(o, l), lse[..., :l]
  # A query that sees nothing gets the mean of all values, and a log-sum-exp far below any that is real.
  return jnp.where(rearrange(lse, "b a l -> b l a 1") < EMPTY, 0.0, o), jnp.maximum(lse, EMPTY)


def _backward(q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, o: Queries, do: Queries):
  (b, l, _, width), s = q.shape, k.shape[1]
  options = {"mask_info": ALL, "bq": _side(l), "bkv": _side(s), **LAYOUT, **_options()}

  def clip(*arrays):
    q, k, v, lse, delta, do, ids = arrays
    given = q, k, v, ids, None, lse, do, delta
    _, dk, dv = pallas._splash_attention_bwd_dkv(*given, bkv_compute=_side(s), use_fused_bwd_kernel=False, **options)
    return pallas._splash_attention_bwd_dq(*given, **options), dk, dv

  dq, dk, dv = jax.vmap(clip)(_heads(q * width ** -0.5), _heads(k), _heads(v), _fill(lse, 2), _fill(delta_of(o, do), 2),
                              _heads(do), _segments(ids, b, l, s))
  return _tokens(dq, l) * width ** -0.5, _tokens(dk, s), _tokens(dv, s)


SPLASH = Kernel(_forward, _backward)
