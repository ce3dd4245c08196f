"""The codec of the small configs: pixels moved into channels, no weights, nothing lost.

Latents are pixels times `scale`. The network must say v = eps - x0, and its error in the noise it copies counts in
pixels as 1/scale; so a scale above 1 makes it speak mostly of the picture, as networks that predict x0 do (Li and He
2025, arXiv:2511.13720). A power of two loses no bit. Times must then be shifted toward noise by about as much.

Frame 0 is repeated m times so that it fills a latent frame of its own, as masks are packed; decoding takes the last.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from anisora_jax.errors import BadInput
from anisora_jax.shapes import Frames, Latents


@jax.tree_util.register_static
@dataclass(frozen=True)
class Pixels:
  """Space-to-depth. spatial: pixels a side of a latent cell; temporal: frames of a latent frame; scale: of latents."""

  spatial: int = 2
  temporal: int = 1
  scale: float = 1.0

  def __post_init__(self):
    rules = {"spatial": (self.spatial >= 1, "1 or more"), "temporal": (self.temporal >= 1, "1 or more"),
             "scale": (0 < self.scale < math.inf, "above 0")}
    for name, (right, allowed) in rules.items():
      if not right:
        raise BadInput(f"codec.{name} is {getattr(self, name)!r}: it must be {allowed}.")

  @property
  def channels(self) -> int:
    return 3 * self.temporal * self.spatial**2

  def encode(self, frames: Frames) -> Latents:
    """Frames in [-1, 1] -> latents in [-scale, scale]."""
    frames = jnp.concatenate([frames[:, :1]] * (self.temporal - 1) + [frames], axis=1)
    return rearrange(frames * self.scale, "b (f m) (h p) (w q) c -> b f h w (m p q c)", m=self.temporal, p=self.spatial,
                     q=self.spatial)

  def decode(self, latents: Latents) -> Frames:
    """The inverse of `encode`."""
    frames = rearrange(latents, "b f h w (m p q c) -> b (f m) (h p) (w q) c", m=self.temporal, p=self.spatial,
                       q=self.spatial)
    return frames[:, self.temporal - 1:] / self.scale
