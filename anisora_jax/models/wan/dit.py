"""The Wan video transformer: noisy latents, noise times, what is given and text -> velocity.

Tokens keep their frame axis, `[b, f, n, d]`, so one noise time a frame modulates as `[b, f, 1, 6, d]` by broadcasting:
a vector of times costs what a scalar costs. A time a token, on request, costs the whole `[b, f, n, 6, d]`.
One block (m = learned + time, six vectors shift, scale, gate twice):
  x <- x + gate1 SelfAttention(LN(x)(1 + scale1) + shift1)
  x <- x + CrossAttention(LN'(x), text) [+ the same queries over image tokens]
  x <- x + gate2 MLP(LN(x)(1 + scale2) + shift2)
From: Wan 2.1, arXiv:2503.20314 (wan/modules/model.py).
"""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from anisora_jax.errors import BadInput
from anisora_jax.models import rope
from anisora_jax.models.attention import PATTERNS, to_text
from anisora_jax.models.blocks import (
  MLP,
  SMALL,
  LayerNorm,
  RMSNorm,
  from_patches,
  layer_norm,
  linear,
  to_patches,
  waves,
)
from anisora_jax.models.remat import INPUT, REMAT
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel.mesh import BATCH
from anisora_jax.parallel.placement import TOKENS, hold
from anisora_jax.parallel.sight import ALL, Rule, parse
from anisora_jax.shapes import Latents, Segments, Tokens

Time = Float[Array, "b _ _ 6 d"]  # of frames, of a frame's tokens: each of length 1 when all share a time


def _scaled_normal(key, shape, dtype=jnp.float32):
  """The start of learned modulations: normal with variance 1 / width."""
  return initializers.normal(shape[-1] ** -0.5)(key, shape, dtype)


def _gated(gate: float, key, shape, dtype=jnp.float32):
  """The same for shift, scale, gate, shift, scale, gate, with `gate` added to the gates."""
  return _scaled_normal(key, shape, dtype) + jnp.array([0, 0, gate, 0, 0, gate], dtype)[:, None]


class Attention(nn.Module):
  """The learned parts around attention: projections, and norms over all heads together."""

  size: Size
  mesh: Mesh
  pattern: str
  kernel: str
  dtype: DTypeLike

  def project(self, x: Float[Array, "... d"], name: str) -> Float[Array, "... a k"]:
    """One of q, k, v, split into heads; queries and keys are normalised before the split."""
    y = linear(self.size.width, name, self.dtype, self.mesh, "out")(x)
    if name[0] != "v":
      y = RMSNorm(name=f"norm_{name}")(y)
    return rearrange(y, "... (a k) -> ... a k", a=self.size.heads)

  def join(self, o: Float[Array, "b f n a k"]) -> Tokens:
    return linear(self.size.width, "o", self.dtype, self.mesh, "in")(rearrange(o, "b f n a k -> b f n (a k)"))


class SelfAttention(Attention):
  """Every token of a clip with every other that the rule lets it see, by position."""

  rule: Rule = ALL

  @nn.compact
  def __call__(self, x: Tokens, turns, segments) -> Tokens:
    q, k = (rope.rotate(self.project(x, name), *turns) for name in "qk")
    o = PATTERNS[self.pattern](q, k, self.project(x, "v"), segments, self.mesh, self.kernel, self.rule)
    return self.join(o)


class CrossAttention(Attention):
  """Tokens with text, and with image tokens by a softmax of their own; the two results are added.

  Where several clips share a row, text and image tokens are [b, clip, s, d], and tokens see those of their own clip.
  """

  @nn.compact
  def __call__(self, x: Tokens, text: Float[Array, "b *k s d"], image: Float[Array, "b *k i d"] | None,
               segments: Segments | None) -> Tokens:
    q = self.project(x, "q")

    def attend(told: Float[Array, "b *k s d"], kind: str) -> Float[Array, "b f n a k"]:
      ids = None
      if told.ndim == 4:
        ids = segments, jnp.broadcast_to(jnp.arange(told.shape[1])[:, None], told.shape[:3]).reshape(len(told), -1)
        told = rearrange(told, "b k s d -> b (k s) d")
      return to_text(q, self.project(told, f"k{kind}"), self.project(told, f"v{kind}"), self.mesh, self.kernel, ids)

    o = attend(text, "")
    return self.join(o if image is None else o + attend(image, "_image"))


class Block(nn.Module):
  """One layer, in the form of a scan: tokens in, tokens out."""

  size: Size
  mesh: Mesh
  pattern: str
  kernel: str
  dtype: DTypeLike
  gate: float
  rule: Rule = ALL

  @nn.compact
  def __call__(self, x: Tokens, time: Time, text, image, turns, segments) -> tuple[Tokens, None]:
    parts = {"size": self.size, "mesh": self.mesh, "pattern": self.pattern, "kernel": self.kernel, "dtype": self.dtype}
    x = checkpoint_name(x, INPUT)
    learned = self.param("modulation", partial(_gated, self.gate), (6, self.size.width))
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(learned + time, -2, 0)

    def add(x, y, gate=1.0):  # f32: small updates must not vanish in a bf16 sum
      return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(self.dtype)

    y = (layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype)
    x = add(x, SelfAttention(**parts, rule=self.rule, name="self_attention")(y, turns, segments), gate1)
    y = LayerNorm(name="cross_norm")(x).astype(self.dtype)
    x = add(x, CrossAttention(**parts, name="cross_attention")(y, text, image, segments))
    y = (layer_norm(x) * (1 + scale2) + shift2).astype(self.dtype)
    x = add(x, MLP(self.size.mlp, self.size.width, self.dtype, self.mesh, name="mlp")(y), gate2)
    return hold(x, self.mesh, TOKENS), None


class ImageTokens(nn.Module):
  """Tokens of an image encoder, brought to the transformer's width (Wan 2.1 image-to-video).

  positions: how many tokens have a learned position each, which is added first; then there are exactly so many.
  """

  width: int
  positions: int
  dtype: DTypeLike
  mesh: Mesh

  @nn.compact
  def __call__(self, image: Float[Array, "b i y"]) -> Float[Array, "b i d"]:
    if self.positions:
      if image.shape[1] != self.positions:
        raise BadInput(f"{image.shape[1]} image tokens and {self.positions} positions: give the first frame's tokens, "
                       "then the last frame's.")
      image = image + self.param("positions", initializers.zeros, (self.positions, image.shape[-1]))
    y = LayerNorm(eps=1e-5, name="norm_in")(image)
    exact = partial(nn.gelu, approximate=False)
    y = MLP(image.shape[-1], self.width, self.dtype, self.mesh, activation=exact, name="mlp")(y)
    return LayerNorm(eps=1e-5, name="norm_out")(y)


class Head(nn.Module):
  """Tokens -> the velocity of their patch."""

  size: Size
  mesh: Mesh

  @nn.compact
  def __call__(self, x: Tokens, time: Float[Array, "b _ _ d"]) -> Float[Array, "b f n i"]:
    learned = self.param("modulation", _scaled_normal, (2, self.size.width))
    shift, scale = jnp.moveaxis(learned + time[..., None, :], -2, 0)
    y = layer_norm(x) * (1 + scale) + shift
    # f32 and zeros at first: the velocity starts at nothing, and its error is what the loss measures.
    return linear(self.size.patch**2 * self.size.channels, "out", jnp.float32, self.mesh, init=initializers.zeros)(y)


class WanDiT(nn.Module):
  """The whole transformer. remat, pattern, kernel: names in REMAT, attention.PATTERNS, attention.LOCAL.

  gate: what gates start from, 0 in Wan; a small model trained from scratch moves sooner from 0.5. mask: of
  self-attention, which frames see which, as `sight.parse` reads it.
  """

  size: Size
  mesh: Mesh
  pattern: str = "ring"
  kernel: str = "dense"
  remat: str = "attention"
  dtype: DTypeLike = jnp.float32
  gate: float = 0.0
  mask: str = "all"

  @nn.compact
  def __call__(self, x: Latents, t: Float[Array, "b _"] | Float[Array, "b f n"], text: Float[Array, "b *k s e"],
               given: Float[Array, "b f h w g"] | None = None, image: Float[Array, "b *k i y"] | None = None,
               segment: Int[Array, "b f"] | None = None) -> Latents:
    """Velocity `[b, f, h, w, c]` in f32.

    t: `[b, f]`, or `[b, 1]` when all frames share a time, or one a token, rows before columns. text: s up to
    size.text_tokens, may be 0. given: mask then known latents, for models that were made with them. h and w must divide
    by the patch. segment: where several clips share a row, the number of each frame's clip, -1 for none; text and image
    are then [b, clip, ...], and no clip sees another.
    """
    size, (b, f, h, w, _) = self.size, x.shape
    seen = x if given is None else jnp.concatenate([x, given], axis=-1)
    tokens = to_patches(seen, size.patch)
    n = tokens.shape[2]
    # Padding, seen by none, so that frames and tokens of a frame divide by their mesh axes.
    spare = (0, -f % self.mesh.shape["clip"]), (0, -n % self.mesh.shape["seq"])
    tokens = jnp.pad(tokens, ((0, 0), *spare, (0, 0)))
    tokens = hold(linear(size.width, "patch_in", self.dtype, self.mesh)(tokens), self.mesh, TOKENS)
    positions, segments = rope.grid(f, h // size.patch, w // size.patch), None
    if segment is not None or spare != ((0, 0), (0, 0)):
      of_frames = jnp.zeros((b, f), jnp.int32) if segment is None else segment
      segments = jnp.broadcast_to(of_frames[..., None], (b, f, n))
      segments = jnp.pad(segments, ((0, 0), *spare), constant_values=-1)
    rule = replace(parse(self.mask, f), packed=segment is not None)
    if segment is not None:
      positions = rope.restarted(positions, segment)
    positions = jnp.pad(positions, ((0, 0),) * (positions.ndim - 3) + (*spare, (0, 0)))

    if t.shape[1] > 1:  # one time is every frame's
      t = jnp.pad(t, ((0, 0), *spare)[:t.ndim])
    e, time = self._times(t)
    text = jnp.pad(text, ((0, 0),) * (text.ndim - 2) + ((0, size.text_tokens - text.shape[-2]), (0, 0)))
    text = MLP(size.width, size.width, self.dtype, self.mesh, init=SMALL, name="text")(text)
    text = hold(text, self.mesh, P(BATCH))
    if image is not None:
      made = ImageTokens(size.width, size.image_positions, self.dtype, self.mesh, name="image")
      image = hold(made(image.reshape(-1, *image.shape[-2:])).reshape(*image.shape[:-1], -1), self.mesh, P(BATCH))

    block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast,) * 5,
                    length=size.layers)
    stack = stack(size, self.mesh, self.pattern, self.kernel, self.dtype, self.gate, rule, name="blocks")
    tokens, _ = stack(tokens, time, text, image, rope.turns(positions, size.head_width), segments)
    patches = hold(Head(size, self.mesh, name="head")(tokens, e), self.mesh, TOKENS)
    return from_patches(patches[:, :f, :n], size.patch, h, w)

  def _times(self, t: Float[Array, "b _"] | Float[Array, "b f n"]) -> tuple[Float[Array, "b _ _ d"], Time]:
    """Noise times -> their embedding, and what the blocks are modulated with."""
    width, of = self.size.width, TOKENS[1:t.ndim] if t.shape[1] > 1 else (None,) * (t.ndim - 1)
    e = nn.silu(linear(width, "time_in", jnp.float32, self.mesh, init=SMALL)(waves(t, self.size.waves)))
    e = linear(width, "time_out", jnp.float32, self.mesh, "out", SMALL)(e)
    e = hold(e, self.mesh, P(BATCH, *of, None))
    time = linear(6 * width, "time_modulation", jnp.float32, self.mesh, "out")(nn.silu(e))
    time = hold(rearrange(time, "... (s d) -> ... s d", s=6), self.mesh, P(BATCH, *of, None, None))
    return (e, time) if t.ndim == 3 else (e[:, :, None], time[:, :, None])
