"""A stand-in for NVIDIA's fused attention on CPUs, after cuDNN's own description of its two calls.

With it all that JAX does round them runs here as on a card: what a card computes is seen only there.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir

F32 = {"preferred_element_type": jnp.float32}


def logits(q, k, q_lengths, k_lengths, scale, mask_type, layout, **options):
  """([b, a, l, s] in f32, -inf for keys beyond their length; [b, 1, l, 1], whether a query is within its own)."""
  assert layout == fused.AttentionLayout.BTNH.value and options["variadic_args"] == (False, False)
  assert not options["dropout_rate"] and options["sliding_window_length"] is None
  found = jnp.einsum("blak,bsak->bals", q, k, **F32) * scale
  if mask_type == fused.MaskType.NO_MASK:
    return found, jnp.ones((len(q), 1, q.shape[1], 1), bool)
  assert mask_type == fused.MaskType.PADDING
  q_known, k_known = (jnp.arange(x.shape[1]) < lengths[:, None] for x, lengths in ((q, q_lengths), (k, k_lengths)))
  return jnp.where(k_known[:, None, None], found, -jnp.inf), q_known[:, None, :, None]


def forward(q, k, v, bias, q_lengths, k_lengths, *none, is_training, **options):
  """What it says of queries beyond their length is no number."""
  assert is_training
  found, known = logits(q, k, q_lengths, k_lengths, **options)
  o = jnp.einsum("bals,bsak->blak", jax.nn.softmax(found), v, **F32)
  lse = jnp.where(known[..., 0], jax.nn.logsumexp(found, -1), jnp.nan)
  return [jnp.where(known[:, 0, :, None], o, jnp.nan).astype(q.dtype), lse]


def backward(q, k, v, bias, q_lengths, k_lengths, *rest, **options):
  *_, lse, o, do = rest
  found, known = logits(q, k, q_lengths, k_lengths, **options)
  weights = jnp.where(known, jnp.exp(found - lse[..., None]), 0.0)
  delta = jnp.einsum("blak,blak->bal", o, do, **F32)
  dlogits = weights * (jnp.einsum("blak,bsak->bals", do, v, **F32) - delta[..., None]) * options["scale"]
  dq, dk = jnp.einsum("bals,bsak->blak", dlogits, k, **F32), jnp.einsum("bals,blak->bsak", dlogits, q, **F32)
  dv = jnp.einsum("bals,blak->bsak", weights, do, **F32)
  return [grad.astype(x.dtype) for grad, x in zip((dq, dk, dv), (q, k, v), strict=True)]


def stand_in() -> None:
  """From now on both calls work on CPUs of this process."""
  calls = {fused._dot_product_attention_fwd_p: forward, fused._dot_product_attention_bwd_p: backward}
  for primitive, work in calls.items():
    mlir.register_lowering(primitive, mlir.lower_fun(work, multiple_results=True), platform="cpu")
