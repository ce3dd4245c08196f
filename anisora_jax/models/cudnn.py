"""NVIDIA's fused attention as a block of a ring: forward, and backward from an output and a log-sum-exp over all keys.

JAX has primitives for both, but no public name (the same in 0.10 and 0.11; the tests would see them change): what it
makes public rounds the log-sum-exp to the inputs' type, and takes none from outside. What a block returns is rounded to
the inputs' type before blocks are added up.
"""

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float

from anisora_jax.errors import BadInput
from anisora_jax.parallel.ring import Ids, Kernel, Keys, LogSum, Queries


def _even(x: Float[Array, "b l a k"]) -> Float[Array, "b t a k"]:
  """JAX's own calls of cuDNN refuse to train on odd lengths, so that nobody has tried them."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _call(primitive, ids: Ids, q: Queries, k: Keys, v: Keys, *more: Array, **options) -> list[Array]:
  """more: what a backward pass needs besides, padded."""
  if ids is not None:
    raise BadInput("kernel 'cudnn' takes no segment ids or padding: choose tokens that divide, or kernel 'blockwise'.")
  l, s, width = q.shape[1], k.shape[1], q.shape[-1]
  if width % 8 or width > 256:
    raise BadInput(f"kernel 'cudnn' takes heads whose width is a multiple of 8 and at most 256, got {width}: use "
                   "'blockwise'.")
  even = l % 2 == s % 2 == 0
  none = jnp.zeros(0, q.dtype)
  zeros = 0 * q[:, 0, 0, 0].astype(jnp.int32)  # under vmap JAX wants lengths that are mapped as q is
  lengths = (none, none) if even else (zeros + l, zeros + s)
  # Not given: a bias, offsets of packed clips and tables of pages.
  return primitive.bind(
    _even(q), _even(k), _even(v), none, *lengths, none, none, none, none, *more, scale=width ** -0.5, seed=0,
    dropout_rate=0.0, variadic_args=(False, False), sliding_window_length=None,
    mask_type=fused.MaskType.NO_MASK if even else fused.MaskType.PADDING, layout=fused.AttentionLayout.BTNH.value,
    **options)


def _forward(q: Queries, k: Keys, v: Keys, ids: Ids = None):
  o, lse = _call(fused._dot_product_attention_fwd_p_wrapper, ids, q, k, v, is_training=True)
  return o[:, :q.shape[1]].astype(jnp.float32), lse[..., :q.shape[1]]


def _backward(q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, o: Queries, do: Queries):
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[1] % 2)))
  made = _call(fused._dot_product_attention_bwd_p_wrapper, ids, q, k, v, lse, _even(o), _even(do))
  return tuple(x[:, :like.shape[1]].astype(jnp.float32) for x, like in zip(made, (q, k, v), strict=True))


CUDNN = Kernel(_forward, _backward)
