"""The layers of the Wan codecs: channels last, causal in time, able to go on where the chunk before left off.

A layer that looks back keeps the last frames it saw in the collection "past". A clip's first chunk comes without it;
where it is mutable, the layer leaves there what the next chunk needs. So one code serves whole clips and chunks, and a
whole clip is the closed form of the published chunk-wise caches: before the clip there are zeros, and the first frame
passes the steps in time by itself.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float

from anisora_jax.models.wan.vae_sizes import Level

Clip = Float[Array, "b f h w c"]
Made = Float[Array, "b f2 h2 w2 c2"]  # of a clip, in other sizes
Past = Float[Array, "b k h w c"]
# As torch starts its convolutions: variance 1 / (3 inputs).
KERNEL = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def recall(layer: nn.Module, x: Clip, count: int) -> Past | None:
  """The last `count` frames that the layer saw before x, None at the start of a clip; leaves the last of x there."""
  past = layer.get_variable("past", "frames") if layer.has_variable("past", "frames") else None
  if layer.is_mutable_collection("past"):
    seen = x[:, -count:] if past is None else jnp.concatenate([past, x], 1)[:, -count:]
    layer.put_variable("past", "frames", before(seen, count - seen.shape[1]))
  return past


def before(x: Clip, count: int) -> Made:
  """x after `count` frames of zeros."""
  return jnp.pad(x, ((0, 0), (count, 0), (0, 0), (0, 0), (0, 0))) if count else x


def causal(x: Clip, past: Past | None, tap: Callable[[int, Array], Array]) -> Made:
  """A kernel of three frames, the last of which lies on the frame that is made. tap: (number in the kernel, frames)."""
  f = x.shape[1]
  if past is None:  # zeros need no arithmetic
    return sum(before(tap(2 - back, x[:, :f - back]), back) for back in range(min(3, f)))
  seen = jnp.concatenate([past, x], 1)
  return sum(tap(k, seen[:, k:k + f]) for k in range(3))


def conv_frames(x: Clip, kernel: Float[Array, "3 3 c o"], stride: int = 1) -> Made:
  """A 3x3 convolution of every frame, zeros around it; at stride 2 below and right only, as Wan's steps down."""
  b, sides = x.shape[0], (1, 1) if stride == 1 else (0, 1)
  y = lax.conv_general_dilated(rearrange(x, "b f h w c -> (b f) h w c"), kernel, (stride, stride), (sides, sides),
                               dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return rearrange(y, "(b f) h w c -> b f h w c", b=b)


def _weights(layer: nn.Module, sides: tuple[int, ...], width: int) -> tuple[Array, Array]:
  """Kernel and bias of a layer, in the layer's dtype. sides: of the kernel, input channels last."""
  kernel = layer.param("kernel", KERNEL, (*sides, width))
  return kernel.astype(layer.dtype), layer.param("bias", initializers.zeros, (width,)).astype(layer.dtype)


class Conv(nn.Module):
  """A convolution, causal in time, or of each frame by itself; parameters f32, arithmetic in dtype.

  sides: of the kernel: (3, 3, 3) or (3, 3). stride: in space, of the latter.
  """

  width: int
  sides: tuple[int, ...]
  dtype: object
  stride: int = 1

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    kernel, bias = _weights(self, (*self.sides, x.shape[-1]), self.width)
    x = x.astype(self.dtype)
    if self.sides == (3, 3):
      return conv_frames(x, kernel, self.stride) + bias
    # Frame by frame of the kernel: on a CPU XLA takes two to six times as long for a convolution in three dimensions.
    return causal(x, recall(self, x, 2), lambda k, x: conv_frames(x, kernel[k])) + bias


class HalveTime(nn.Module):
  """Every two frames become one, by a kernel of three; the first of a clip passes as it is."""

  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    kernel, bias = _weights(self, (3, x.shape[-1]), x.shape[-1])
    past = recall(self, x, 1)
    seen = x if past is None else jnp.concatenate([past, x], 1)
    pairs = (seen.shape[1] - 1) // 2
    made = sum(seen[:, k:k + 2 * pairs:2] @ kernel[k] for k in range(3)) + bias
    return jnp.concatenate([x[:, :1], made], 1) if past is None else made


class DoubleTime(nn.Module):
  """Every frame becomes two, by a causal kernel; the first of a clip passes as it is, and the others never see it."""

  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    kernel, bias = _weights(self, (3, x.shape[-1]), 2 * x.shape[-1])
    rest = x if self.has_variable("past", "frames") else x[:, 1:]
    past = recall(self, rest, 2)
    if not rest.shape[1]:
      return x
    made = causal(rest, past, lambda k, x: x @ kernel[k]) + bias
    made = rearrange(made, "b f h w (t c) -> b (f t) h w c", t=2)
    return jnp.concatenate([x[:, :1], made], 1) if past is None else made


class Norm(nn.Module):
  """Length sqrt(c) over the channels with a learned scale, in f32; returns x's dtype."""

  @nn.compact
  def __call__(self, x: Clip) -> Clip:
    scale = self.param("scale", initializers.ones, x.shape[-1:])
    wide = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))
    return (wide / length * (x.shape[-1] ** 0.5 * scale)).astype(x.dtype)


class Residual(nn.Module):
  """Twice norm, SiLU and convolution, around which the input passes."""

  width: int
  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    y = Conv(self.width, (3, 3, 3), self.dtype, name="conv_in")(nn.silu(Norm(name="norm_in")(x)))
    y = Conv(self.width, (3, 3, 3), self.dtype, name="conv_out")(nn.silu(Norm(name="norm_out")(y)))
    if x.shape[-1] != self.width:
      x = nn.Dense(self.width, dtype=self.dtype, name="shortcut")(x)
    return x + y


class Attention(nn.Module):
  """Every pixel of a frame sees every pixel of that frame, one head; logits and softmax f32, a frame at a time."""

  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Clip:
    h, c = x.shape[2], x.shape[-1]

    def frame(qkv: Float[Array, "b n _"]) -> Float[Array, "b n c"]:
      q, k, v = jnp.split(qkv, 3, -1)
      logits = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32) * c**-0.5
      return jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(logits).astype(v.dtype), v)

    qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(Norm(name="norm")(x))
    seen = lax.map(frame, rearrange(qkv, "b f h w c -> f b (h w) c"))
    return x + nn.Dense(c, dtype=self.dtype, name="out")(rearrange(seen, "f b (h w) c -> b f h w c", h=h))


class Middle(nn.Module):
  """What stands between the levels and the latents: a block, attention, a block."""

  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Clip:
    x = Attention(self.dtype, name="attention")(Residual(x.shape[-1], self.dtype, name="block_in")(x))
    return Residual(x.shape[-1], self.dtype, name="block_out")(x)


class Down(nn.Module):
  """Blocks, then half the rows and columns and perhaps frames; with `shortcut` the mean of what is merged is added."""

  level: Level
  blocks: int
  shortcut: bool
  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    y, level = x, self.level
    for number in range(self.blocks):
      y = Residual(level.o, self.dtype, name=f"block_{number}")(y)
    if level.step:
      y = Conv(level.o, (3, 3), self.dtype, stride=2, name="space")(y)
    if level.step == "time":
      y = HalveTime(self.dtype, name="time")(y)
    return y + merge(x, level) if self.shortcut else y


class Up(nn.Module):
  """Blocks, then perhaps twice the frames, and twice the rows and columns; with `shortcut` x is added, repeated."""

  level: Level
  blocks: int
  shortcut: bool
  dtype: object

  @nn.compact
  def __call__(self, x: Clip) -> Made:
    y, level = x, self.level
    for number in range(self.blocks):
      y = Residual(level.o, self.dtype, name=f"block_{number}")(y)
    if level.step == "time":
      y = DoubleTime(self.dtype, name="time")(y)
    if level.step:
      y = Conv(level.after, (3, 3), self.dtype, name="space")(repeat(y, "b f h w c -> b f (h 2) (w 2) c"))
    return y + part(x, level, y.shape[1]) if self.shortcut and level.step else y


def merge(x: Clip, level: Level) -> Made:
  """Moves what a step down merges into channels, and takes means of as many neighbours as give `level.after` channels.

  An odd number of frames, which only a clip's first chunk has, comes after a frame of zeros.
  """
  m, p = (2 if level.step == "time" else 1), (2 if level.step else 1)
  x = before(x, x.shape[1] % m)
  x = rearrange(x, "b (f m) (h p) (w q) c -> b f h w (c m p q)", m=m, p=p, q=p)
  return rearrange(x, "b f h w (o k) -> b f h w o k", o=level.after).mean(-1)


def part(x: Clip, level: Level, frames: int) -> Made:
  """The way back: each channel is repeated and moved out to twice the rows, columns and perhaps frames.

  Of the frames so made the last `frames` stay: a clip's first gives one only.
  """
  m = 2 if level.step == "time" else 1
  x = jnp.repeat(x, level.after * m * 4 // x.shape[-1], axis=-1)
  return rearrange(x, "b f h w (o m p q) -> b (f m) (h p) (w q) o", m=m, p=2, q=2)[:, -frames:]
