"""A stand-in for NVIDIA's fused attention on CPUs, after cuDNN's own description of its two calls.

With it all that JAX does round them runs here as on a card: what a card computes is seen only there.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir

F32 = {"preferred_element_type": jnp.float32}


def logits(q, k, q_lengths, k_lengths, scale, mask_type, layout, **options):
  """[b, a, l, s] in f32, -inf for keys beyond their length; no number for queries beyond theirs."""
  assert layout == fused.AttentionLayout.BTNH.value and options["variadic_args"] == (False, False)
  assert not options["dropout_rate"] and options["sliding_window_length"] is None
  found = jnp.einsum("blak,bsak->bals", q, k, **F32) * scale
  if mask_type == fused.MaskType.NO_MASK:
    return found
  assert mask_type == fused.MaskType.PADDING
  found = jnp.where(jnp.arange(k.shape[1]) < k_lengths[:, None, None, None], found, -jnp.inf)
  return jnp.where(jnp.arange(q.shape[1])[:, None] < q_lengths[:, None, None, None], found, jnp.nan)


def forward(q, k, v, bias, q_lengths, k_lengths, *none, is_training, **options):
  assert is_training
  found = logits(q, k, q_lengths, k_lengths, **options)
  o = jnp.einsum("bals,bsak->blak", jax.nn.softmax(found), v, **F32)
  return [o.astype(q.dtype), jax.nn.logsumexp(found, -1)]


def backward(q, k, v, bias, q_lengths, k_lengths, *rest, **options):
  *_, lse, o, do = rest
  weights = jnp.nan_to_num(jnp.exp(logits(q, k, q_lengths, k_lengths, **options) - lse[..., None]))
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
