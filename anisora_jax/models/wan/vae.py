"""The causal video autoencoders of Wan 2.1 and 2.2: clips <-> latents, whole, chunk by chunk, or tile by tile.

From: wan/modules/vae.py and vae2_2.py of Wan 2.1 and 2.2.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax import lax
from jaxtyping import Array, Float, PyTree

from anisora_jax.errors import BadInput
from anisora_jax.models import tiles
from anisora_jax.models.codec import latent_shape
from anisora_jax.models.wan.vae_layers import Clip, Conv, Down, Made, Middle, Norm, Up
from anisora_jax.models.wan.vae_sizes import VAESize
from anisora_jax.shapes import Frames, Latents


class Encoder(nn.Module):
  """Frames -> mean and log variance of each latent, side by side in the channels; not yet normalised, f32."""

  size: VAESize
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, frames: Frames) -> Float[Array, "b f h w k"]:
    size, dtype, p = self.size, self.dtype, self.size.patch
    # Columns of a patch before its rows: so was Wan 2.2 trained.
    x = rearrange(frames, "b f (h p) (w q) c -> b f h w (c q p)", p=p, q=p)
    x = Conv(size.encoder, (3, 3, 3), dtype, name="conv_in")(x)
    for number, level in enumerate(size.encoder_levels()):
      x = Down(level, size.blocks, size.shortcuts, dtype, name=f"level_{number}")(x)
    x = nn.silu(Norm(name="norm")(Middle(dtype, name="middle")(x)))
    x = Conv(2 * size.channels, (3, 3, 3), dtype, name="conv_out")(x)
    return nn.Dense(2 * size.channels, dtype=dtype, name="latents")(x).astype(jnp.float32)


class Decoder(nn.Module):
  """Latents, not normalised -> frames, not clamped, f32."""

  size: VAESize
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, latents: Latents) -> Frames:
    size, dtype, p = self.size, self.dtype, self.size.patch
    levels = size.decoder_levels()
    x = nn.Dense(size.channels, dtype=dtype, name="latents")(latents)
    x = Middle(dtype, name="middle")(Conv(levels[0].i, (3, 3, 3), dtype, name="conv_in")(x))
    for number, level in enumerate(levels):
      x = Up(level, size.blocks + 1, size.shortcuts, dtype, name=f"level_{number}")(x)
    x = Conv(size.pixel, (3, 3, 3), dtype, name="conv_out")(nn.silu(Norm(name="norm")(x)))
    return rearrange(x.astype(jnp.float32), "b f h w (c q p) -> b f (h p) (w q) c", p=p, q=p)


def in_chunks(net: nn.Module, params: PyTree, x: Clip, count: int) -> Made:
  """The network on a clip's first frame, then on `count` frames at a time; what its layers remember is all it keeps."""
  first, past = net.apply({"params": params}, x[:, :1], mutable=["past"])
  if x.shape[1] == 1:
    return first

  def go_on(past: PyTree, chunk: Clip) -> tuple[PyTree, Made]:
    made, past = net.apply({"params": params, **past}, chunk, mutable=["past"])
    return past, made

  _, rest = lax.scan(go_on, past, rearrange(x[:, 1:], "b (k n) h w c -> k b n h w c", n=count))
  return jnp.concatenate([first, rearrange(rest, "k b n h w c -> b (k n) h w c")], 1)


@struct.dataclass
class WanVAE:
  """The codec. Its only leaves are its parameters: pass it to jitted functions as an argument, like any parameters.

  params: {"encoder": ..., "decoder": ...}; each is needed only to encode or to decode. dtype: of the arithmetic.
  chunked: latent frame by latent frame, in memory that does not grow with the clip; the result is the same. tile,
  overlap: pixels a side of tiles that are worked by themselves and blended where they overlap, which bounds memory for
  any size and changes the result a little; 0 for none. Raises BadInput for tiles that do not fit.
  """

  params: PyTree
  size: VAESize = struct.field(pytree_node=False)
  dtype: object = struct.field(pytree_node=False, default=jnp.float32)
  chunked: bool = struct.field(pytree_node=False, default=False)
  tile: int = struct.field(pytree_node=False, default=0)
  overlap: int = struct.field(pytree_node=False, default=0)

  def __post_init__(self):
    s = self.spatial
    if self.tile % s or self.overlap % s or not 0 <= self.overlap <= self.tile // 2:
      raise BadInput(f"tiles of {self.tile} pixels with an overlap of {self.overlap} do not fit this codec: take "
                     f"multiples of {s}, an overlap of half a tile at most, for example 256 and 64.")

  @property
  def temporal(self) -> int:
    return self.size.temporal

  @property
  def spatial(self) -> int:
    return self.size.spatial

  @property
  def channels(self) -> int:
    return self.size.channels

  def encode(self, frames: Frames, key: Array | None = None) -> Latents:
    """Frames in [-1, 1] -> normalised latents: the posterior's mean, or a sample of it when given a key."""
    latent_shape(self, *frames.shape[1:4])
    moments = self._work("encoder", Encoder, frames, self.temporal, (self.spatial, 1))
    mean, logvar = jnp.split(moments, 2, -1)
    if key is not None:
      # The bounds of the published codecs, so that no spread overflows.
      mean += jnp.exp(0.5 * jnp.clip(logvar, -30, 20)) * jax.random.normal(key, mean.shape)
    return (mean - jnp.asarray(self.size.means)) / jnp.asarray(self.size.deviations)

  def decode(self, latents: Latents) -> Frames:
    """Normalised latents -> frames in [-1, 1]."""
    latents = latents * jnp.asarray(self.size.deviations) + jnp.asarray(self.size.means)
    return jnp.clip(self._work("decoder", Decoder, latents, 1, (1, self.spatial)), -1, 1)

  def _work(self, part: str, network: Callable[..., nn.Module], x: Clip, count: int, cell: tuple[int, int]) -> Made:
    """Runs encoder or decoder as the codec is told. count: frames of a chunk; cell: as of tiles.blend."""
    net, params = network(self.size, self.dtype), self.params[part]
    whole = partial(in_chunks, net, params, count=count) if self.chunked else partial(net.apply, {"params": params})
    if not self.tile:
      return whole(x)
    return tiles.blend(whole, x, self.tile // self.spatial, self.overlap // self.spatial, cell)


def init(key: Array, size: VAESize) -> dict:
  """Random parameters."""
  keys, s = jax.random.split(key), size.spatial
  return {"encoder": Encoder(size).init(keys[0], jnp.zeros((1, 1, s, s, 3)))["params"],
          "decoder": Decoder(size).init(keys[1], jnp.zeros((1, 1, 1, 1, size.channels)))["params"]}
