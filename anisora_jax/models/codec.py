"""What every codec offers: frames to latents and back, and how many frames and pixels one latent covers."""

from typing import Protocol, runtime_checkable

from anisora_jax.errors import BadInput
from anisora_jax.shapes import Frames, Latents


@runtime_checkable
class Codec(Protocol):
  """temporal (m), spatial: pixel frames and pixels a side that one latent cell covers; channels: c.

  Frame 0 has a latent frame of its own; each later latent frame covers m pixel frames: F = 1 + m (f - 1).
  Mid-grey, 0, is what stands for pixels that are not given.

  A codec is a pytree whose leaves are its parameters, or none. Where they are many, give it to jitted functions as an
  argument: closed over, they become constants of the compiled program.
  """

  temporal: int
  spatial: int

  @property
  def channels(self) -> int: ...

  def encode(self, frames: Frames) -> Latents: ...

  def decode(self, latents: Latents) -> Frames: ...


def latent_shape(codec: Codec, frames: int, height: int, width: int, patch: int = 1) -> tuple[int, int, int]:
  """(f, h, w) of a clip. Raises BadInput for a size that the codec cannot hold, or the network not cut into patches.

  patch: latent cells a side of what is one token.
  """
  m, s = codec.temporal, codec.spatial * patch
  if frames < 1 or (frames - 1) % m:
    raise BadInput(f"{frames} frames do not fit a codec of temporal stride {m}: take 1 + {m}k, "
                   f"for example {1 + m * max(0, (frames - 1) // m)}.")
  if height % s or width % s or height < s or width < s:
    patches = f" under patches of {patch}" if patch > 1 else ""
    raise BadInput(f"{height}x{width} pixels do not fit a codec of spatial stride {codec.spatial}{patches}: take "
                   f"multiples of {s}, for example {max(1, height // s) * s}x{max(1, width // s) * s}.")
  return 1 + (frames - 1) // m, height // codec.spatial, width // codec.spatial
