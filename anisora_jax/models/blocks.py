"""Norms, linear layers, time modulation, patches: what transformers over video tokens share."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.nn import initializers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from anisora_jax.parallel.placement import hold

SPREAD = initializers.xavier_uniform()
SMALL = initializers.normal(0.02)
KERNELS = {"": P(), "in": P("tensor", None), "out": P(None, "tensor")}  # how a kernel lies during its product


class Linear(nn.Module):
  """A linear layer with bias: parameters f32, arithmetic in `dtype`.

  split: the side of the kernel, "in" or "out", that stays split over tensor during the product; over fsdp it is whole.
  Where adapters `lora_a` [i, r] and `lora_b` [r, o] stand beside the kernel, x lora_a lora_b is added. Added to the
  kernel instead, they would take a gradient as large as the kernel's, and its sum over the devices.
  """

  width: int
  dtype: object
  mesh: Mesh
  split: str = ""
  init: object = SPREAD

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    kernel = self.param("kernel", self.init, (x.shape[-1], self.width))
    y = self._product(x, kernel, self.split) + self.param("bias", initializers.zeros, (self.width,)).astype(self.dtype)
    if self.has_variable("params", "lora_a"):
      a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
      inner = self._product(x, a, "in" if self.split == "in" else "")
      y = y + self._product(inner, b, "out" if self.split == "out" else "")
    return y

  def _product(self, x: Float[Array, "*b i"], kernel: Float[Array, "i o"], split: str) -> Float[Array, "*b o"]:
    # Held, for if a product meets a batch and a kernel that both are split over fsdp, the compiler may lose a sum of
    # the backward pass without a word (data 2 x fsdp 2 x tensor 2, jax 0.10.2; openxla/xla issue 40034 is such).
    kernel = hold(kernel.astype(self.dtype), self.mesh, KERNELS[split])
    return lax.dot_general(x.astype(self.dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())))


def linear(width: int, name: str, dtype, mesh: Mesh, split: str = "", init=SPREAD) -> Linear:
  """A `Linear` of a name."""
  return Linear(width, dtype, mesh, split, init, name=name)


def layer_norm(x: Float[Array, "*b d"], eps: float = 1e-6) -> Float[Array, "*b d"]:
  """Zero mean and unit variance over d, without parameters, in f32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


class LayerNorm(nn.Module):
  """`layer_norm` followed by a learned scale and shift, in f32."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", initializers.ones, x.shape[-1:])
    return layer_norm(x, self.eps) * scale + self.param("bias", initializers.zeros, x.shape[-1:])


class RMSNorm(nn.Module):
  """Unit root mean square over d with a learned scale, in f32; returns x's dtype."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", initializers.ones, x.shape[-1:])
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


class MLP(nn.Module):
  """Linear, GELU (by default its tanh approximation), linear; hidden units are split over tensor."""

  hidden: int
  width: int
  dtype: object
  mesh: Mesh
  init: object = SPREAD
  activation: object = nn.gelu

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    hidden = self.activation(linear(self.hidden, "up", self.dtype, self.mesh, "out", self.init)(x))
    return linear(self.width, "down", self.dtype, self.mesh, "in", self.init)(hidden)


def waves(t: Float[Array, "*b"], width: int) -> Float[Array, "*b width"]:
  """Sinusoidal embedding of a noise time, cosines first. t: 0 clean .. 1 noise; the network sees 1000 t.

  From: Vaswani et al. 2017, arXiv:1706.03762, with the frequencies 10000^(-i / (width/2)).
  """
  # f32: at 1000 t a bf16 angle is off by whole turns.
  frequency = jnp.asarray(10000.0 ** (-np.arange(width // 2) / (width // 2)), jnp.float32)
  angle = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def to_patches(x: Shaped[Array, "b f h w c"], p: int) -> Shaped[Array, "b f n i"]:
  """Cuts each frame into p x p patches, i = c p p, rows before columns; refuses sides that do not divide."""
  return rearrange(x, "b f (h p) (w q) c -> b f (h w) (c p q)", p=p, q=p)


def from_patches(x: Shaped[Array, "b f n i"], p: int, h: int, w: int) -> Shaped[Array, "b f h w c"]:
  """Joins patches to frames of h x w; inside a patch the channel runs fastest (Wan's unpatchify)."""
  return rearrange(x, "b f (h w) (p q c) -> b f (h p) (w q) c", h=h // p, w=w // p, p=p, q=p)
