"""The same training gradient by diffusers and torch, for bench/step.py."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from anisora_jax.models.wan.sizes import Size


def model(size: Size, tensors: dict[str, np.ndarray]) -> WanTransformer3DModel:
  """diffusers' transformer of this size with these weights, in f32."""
  made = WanTransformer3DModel(
    num_attention_heads=size.heads, attention_head_dim=size.head_width, in_channels=size.channels + size.given,
    out_channels=size.channels, text_dim=size.text_width, freq_dim=size.waves, ffn_dim=size.mlp,
    num_layers=size.layers, image_dim=size.image_width or None,
    added_kv_proj_dim=size.width if size.image_width else None)
  made.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
  return made


def gradient(made: WanTransformer3DModel, size: Size, inputs: dict[str, np.ndarray], compiled: bool) -> Callable:
  """() -> loss; the gradients stay with the parameters.

  A time for each frame is told as diffusers takes it, for each token. compiled: by torch.compile, at the first call.
  """
  given = {name: torch.from_numpy(x) for name, x in inputs.items()}
  seen = torch.movedim(torch.cat([given[name] for name in ("x", "given") if name in given], -1), -1, 1).contiguous()
  target, tokens = torch.movedim(given["target"], -1, 1).contiguous(), seen[0, 0, 0].numel() // size.patch**2
  t = 1000 * given["t"]
  t = t[:, 0] if t.shape[1] == 1 else t.repeat_interleave(tokens, 1)
  call = torch.compile(made) if compiled else made

  def step() -> float:
    made.zero_grad(set_to_none=True)
    loss = torch.square(call(seen, t, given["text"], given.get("image")).sample - target).mean()
    loss.backward()
    return loss.item()

  return step


def gradients(made: WanTransformer3DModel) -> dict[str, np.ndarray]:
  """The gradients of the last step by parameter name."""
  return {name: p.grad.numpy() for name, p in made.named_parameters()}


def use_cores(count: int) -> None:
  torch.set_num_threads(count)
