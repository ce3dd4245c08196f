"""NVIDIA's fused attention as a block of a ring: forward, and backward from an output and a log-sum-exp over all keys.

JAX has primitives for both, but no public name (the same in 0.10 and 0.11; the tests would see them change): what it
makes public rounds the log-sum-exp to the inputs' type, and takes none from outside. What a block returns is rounded to
the inputs' type before blocks are added up. The call hides keys beyond a length, so keys that are padding go behind all
others, which moves little beside what attention works.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Bool, Float, Int

from anisora_jax.errors import BadInput
from anisora_jax.models.splash import EMPTY
from anisora_jax.parallel.ring import Ids, Kernel, Keys, LogSum, Queries


def _even(x: Float[Array, "b l a k"]) -> Float[Array, "b t a k"]:
  """JAX's own calls of cuDNN refuse odd lengths in some cases, so that they are the less tried."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


class _Padding(NamedTuple):
  """known: which keys are tokens. seeing: which queries are, and see some. order: of keys, tokens first."""

  known: Bool[Array, "b s"]
  seeing: Bool[Array, "b l"]
  order: Int[Array, "b s"]

  @property
  def count(self) -> Int[Array, "b"]:
    """Of keys that are seen. cuDNN has no answer where there are none; one that must not be is taken back."""
    return jnp.maximum(self.known.sum(-1), 1)

  def first(self, x: Keys) -> Keys:
    return jnp.take_along_axis(x, self.order[..., None, None], 1)

  def back(self, x: Keys) -> Keys:
    x = jnp.take_along_axis(x, jnp.argsort(self.order)[..., None, None], 1)
    return jnp.where(self.known[..., None, None], x, 0)


def _padding(ids: Ids) -> _Padding | None:
  """What hides, if anything does. Raises BadInput where it is more than padding."""
  if ids is None:
    return None
  if ids[0].rule or ids[0].rule.packed:
    raise BadInput("kernel 'cudnn' hides neither frames nor clips that share a row from each other: choose mask 'all' "
                   "and data.packed = 0, or kernel 'blockwise'.")
  queries, known = (x.segment >= 0 for x in ids)
  return _Padding(known, queries & known.any(-1, keepdims=True), jnp.argsort(~known, stable=True))


def _call(primitive, padding: _Padding | None, q: Queries, k: Keys, v: Keys, *more: Array, **options) -> list[Array]:
  """more: what a backward pass needs besides, padded."""
  l, s, width = q.shape[1], k.shape[1], q.shape[-1]
  if width % 8 or width > 256:
    raise BadInput(f"kernel 'cudnn' takes heads whose width is a multiple of 8 and at most 256, got {width}: use "
                   "'blockwise'.")
  whole = padding is None and l % 2 == s % 2 == 0
  none = jnp.zeros(0, q.dtype)
  zeros = 0 * q[:, 0, 0, 0].astype(jnp.int32)  # under vmap JAX wants lengths that are mapped as q is
  lengths = (none, none) if whole else (zeros + l, zeros + (padding.count if padding else s))
  if padding:
    k, v = padding.first(k), padding.first(v)
  # Not given: a bias, offsets of packed clips and tables of pages.
  return primitive.bind(
    _even(q), _even(k), _even(v), none, *lengths, none, none, none, none, *more, scale=width ** -0.5, seed=0,
    dropout_rate=0.0, variadic_args=(False, False), sliding_window_length=None,
    mask_type=fused.MaskType.NO_MASK if whole else fused.MaskType.PADDING, layout=fused.AttentionLayout.BTNH.value,
    **options)


def _forward(q: Queries, k: Keys, v: Keys, ids: Ids = None):
  padding = _padding(ids)
  o, lse = _call(fused._dot_product_attention_fwd_p_wrapper, padding, q, k, v, is_training=True)
  o, lse = o[:, :q.shape[1]].astype(jnp.float32), lse[..., :q.shape[1]]
  if padding:
    o, lse = jnp.where(padding.seeing[..., None, None], o, 0), jnp.where(padding.seeing[:, None], lse, EMPTY)
  return o, lse


def _backward(q: Queries, k: Keys, v: Keys, ids: Ids, lse: LogSum, o: Queries, do: Queries):
  padding = _padding(ids)
  if padding:
    lse = jnp.where(padding.seeing[:, None], lse, -EMPTY)  # so large that every weight is 0
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[1] % 2)))
  made = _call(fused._dot_product_attention_bwd_p_wrapper, padding, q, k, v, lse, _even(o), _even(do))
  dq, dk, dv = (x[:, :like.shape[1]].astype(jnp.float32) for x, like in zip(made, (q, k, v), strict=True))
  return (dq, padding.back(dk), padding.back(dv)) if padding else (dq, dk, dv)


CUDNN = Kernel(_forward, _backward)
