"""The same codec by diffusers and torch, for bench/vae.py."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from anisora_jax.models.wan.vae_sizes import VAESize


def model(size: VAESize, tensors: dict[str, np.ndarray]) -> AutoencoderKLWan:
  """diffusers' codec of this size with these weights, in f32."""
  made = AutoencoderKLWan(
    base_dim=size.encoder, decoder_base_dim=size.decoder, z_dim=size.channels, dim_mult=list(size.widths),
    num_res_blocks=size.blocks, temperal_downsample=list(size.time_steps), is_residual=size.shortcuts,
    in_channels=size.pixel, out_channels=size.pixel, patch_size=size.patch if size.patch > 1 else None,
    scale_factor_spatial=size.spatial, scale_factor_temporal=size.temporal, latents_mean=list(size.means),
    latents_std=list(size.deviations))
  made.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
  return made


def _first(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _last(x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.numpy(), 1, -1)


def encode(made: AutoencoderKLWan, size: VAESize, frames: np.ndarray) -> Callable[[], np.ndarray]:
  """() -> normalised latents."""
  given = _first(frames)

  @torch.no_grad()
  def work() -> np.ndarray:
    return (_last(made.encode(given).latent_dist.mean) - np.float32(size.means)) / np.float32(size.deviations)

  return work


def decode(made: AutoencoderKLWan, size: VAESize, latents: np.ndarray) -> Callable[[], np.ndarray]:
  """() -> frames."""
  given = _first(latents * np.float32(size.deviations) + np.float32(size.means))

  @torch.no_grad()
  def work() -> np.ndarray:
    return _last(made.decode(given).sample)

  return work


def use_cores(count: int) -> None:
  torch.set_num_threads(count)
