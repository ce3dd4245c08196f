"""Mask and known frames -> what the transformer is allowed to see.

A mask of pixel frames is packed by the codec's temporal stride m: frame 0 fills all m channels of latent frame 0, pixel
frame p > 0 lands in latent frame (p + m - 1) // m, channel (p + m - 1) mod m. From: Wan 2.1 image2video.py and AniSora.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from anisora_jax.shapes import Frames, Latents, Mask, PixelMask


@struct.dataclass
class Condition:
  """What is given of a batch of clips, on the latent canvas.

  mask: 1 = given. known: latents of the given pixels, hidden pixels mid-grey. held: cells given in every pixel frame
  they cover; they need no loss and come out of sampling as they went in. frozen: frames all of whose cells are held.
  image: tokens of given pictures, by an image encoder, for transformers that read them; of each clip of a row.
  segment: where several clips share a row, the number of each frame's clip, -1 for none.
  """

  mask: Mask
  known: Latents
  held: Bool[Array, "b f h w 1"]
  frozen: Bool[Array, "b f"]
  image: Float[Array, "b i y"] | Float[Array, "b k i y"] | None = None
  segment: Int[Array, "b f"] | None = None

  def channels(self) -> Float[Array, "b f h w g"]:
    """Mask, then known latents: the channels that follow the noisy latents into the transformer."""
    return jnp.concatenate([self.mask, self.known], axis=-1)

  def told_by_mask_alone(self) -> "Condition":
    """The same, nothing of it held or frozen: given frames are noised and made like all others, as Wan trained."""
    return self.replace(held=jnp.zeros_like(self.held), frozen=jnp.zeros_like(self.frozen))


def pack(mask: Bool[Array, "b F h w"], stride: int) -> Mask:
  """Pixel frames -> m channels of latent frames. Rows of several clips come with each one's frame 0 m times."""
  mask = jnp.concatenate([mask[:, :1]] * (-mask.shape[1] % stride) + [mask], axis=1)
  return rearrange(mask, "b (f m) h w -> b f h w m", m=stride).astype(jnp.float32)


def hide(frames: Frames, mask: PixelMask) -> Frames:
  """The given pixels; all others mid-grey, so that nothing of them can reach the network."""
  size = frames.shape[2] // mask.shape[2]
  given = repeat(mask, "b F h w -> b F (h p) (w q) 1", p=size, q=size)
  return jnp.where(given, frames, 0.0)


def cells_touched(character: Bool[Array, "b F H W"], size: int) -> PixelMask:
  """Latent cells that hold a pixel of the character."""
  return reduce(character, "b F (h p) (w q) -> b F h w", "max", p=size, q=size)


def of_latents(mask: PixelMask, known: Latents, stride: int, image: Array | None = None) -> Condition:
  """What is given under a mask, of which the latents are known already."""
  packed = pack(mask, stride)
  held = packed.min(-1, keepdims=True) > 0
  return Condition(mask=packed, known=known, held=held, frozen=held.all((2, 3, 4)), image=image)


def condition(frames: Frames, mask: PixelMask, encode: Callable[[Frames], Latents], stride: int) -> Condition:
  """What is given of `frames` (in [-1, 1]) under a mask."""
  return of_latents(mask, encode(hide(frames, mask)), stride)


def pictures(frames: Frames, mask: PixelMask, count: int,
             at: Int[Array, "b"] | None = None) -> Float[Array, "b {count} H W 3"]:
  """The given pictures that an image encoder sees, hidden pixels mid-grey.

  count: 1, frame `at`, by default the first that is given whole, or frame 0 where none is; 2, the first and the last
  frame (Wan 2.1 first-last-frame).
  """
  hidden, whole = hide(frames, mask), mask.all((2, 3))
  if count == 2:
    return hidden[:, jnp.array([0, -1])]
  return jax.vmap(lambda clip, at: clip[at][None])(hidden, whole.argmax(1) if at is None else at)
