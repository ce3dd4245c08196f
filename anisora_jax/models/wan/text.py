"""The umT5 encoder: captions -> text tokens that the video transformer reads.

Pre-norm blocks, x <- x + Attention(RMS(x)), x <- x + down(gelu(gate(y)) up(y)) with y = RMS(x), and a last norm.
Queries and keys meet unscaled; each layer adds to a logit its own learned number for the distance between the tokens.
From: Xue et al. 2021, arXiv:2010.11934 (mT5); Chung et al. 2023, arXiv:2304.09151 (umT5, a bias in every layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.nn import initializers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from anisora_jax.models.blocks import KERNELS, RMSNorm
from anisora_jax.models.wan.tokenizer import Tokenizer
from anisora_jax.parallel import placement, rows
from anisora_jax.parallel.mesh import BATCH, WEIGHTS
from anisora_jax.parallel.placement import hold
from anisora_jax.shapes import Text

States = Float[Array, "b s d"]


@dataclass(frozen=True)
class TextSize:
  """Everything that fixes the shapes of the encoder's parameters.

  width: of a token, also of the result. buckets: of distances, half for each direction; far: the distance from which
  all fall into the last bucket.
  """

  layers: int
  width: int
  heads: int
  head_width: int
  mlp: int
  vocabulary: int
  buckets: int = 32
  far: int = 128


TEXT_SIZES = {
  "umt5_xxl": TextSize(layers=24, width=4096, heads=64, head_width=64, mlp=10240, vocabulary=256384),
}


def distance_buckets(s: int, buckets: int, far: int) -> Int[np.ndarray, "s s"]:
  """The bucket of the distance from token i (row) to token j (column).

  Half of the buckets serve each direction. Of those, half hold one distance each; the rest widen by powers up to `far`.
  From: Raffel et al. 2020, arXiv:1910.10683, section 2.1.
  """
  distance = np.arange(s) - np.arange(s)[:, None]
  steps, side = np.abs(distance), buckets // 2
  near = side // 2
  grown = np.log(np.maximum(steps, near) / near) / np.log(far / near)  # 0 where the wide buckets begin .. 1 at `far`
  wide = np.minimum(near + (grown * (side - near)).astype(int), side - 1)
  return np.where(distance > 0, side, 0) + np.where(steps < near, steps, wide)


class Layer(nn.Module):
  """What the layers of a block share. dtype: of the products; norms, softmax and sums between layers are f32."""

  size: TextSize
  mesh: Mesh
  dtype: DTypeLike

  def linear(self, width: int, name: str, split: str) -> nn.Dense:
    """A linear layer without bias. split: the side of the kernel that stays split over tensor, "in" or "out"."""
    def product(x, kernel, *dims, **options):
      return lax.dot_general(x, hold(kernel, self.mesh, KERNELS[split]), *dims, **options)

    return nn.Dense(width, use_bias=False, dtype=self.dtype, name=name, dot_general=product)


class SelfAttention(Layer):
  """Every token of a caption with every real token, by distance."""

  @nn.compact
  def __call__(self, x: States, mask: Bool[Array, "b s"], buckets: Int[Array, "s s"]) -> States:
    size = self.size
    q, k, v = (rearrange(self.linear(size.heads * size.head_width, name, "out")(x), "b s (a k) -> b s a k",
                         a=size.heads) for name in "qkv")
    learned = self.param("distances", initializers.normal(1.0), (size.buckets, size.heads))
    bias = rearrange(learned[buckets].astype(jnp.float32), "s z a -> 1 a s z")
    o = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask[:, None, None], scale=1.0, implementation="xla")
    return self.linear(size.width, "o", "in")(rearrange(o, "b s a k -> b s (a k)"))


class GatedMLP(Layer):
  """Linear times the GELU (tanh) of a second linear, then linear; hidden units are split over tensor."""

  @nn.compact
  def __call__(self, x: States) -> States:
    gate = nn.gelu(self.linear(self.size.mlp, "gate", "out")(x))
    return self.linear(self.size.width, "down", "in")(gate * self.linear(self.size.mlp, "up", "out")(x))


class Block(Layer):
  """One layer, in the form of a scan: tokens in, tokens out."""

  @nn.compact
  def __call__(self, x: States, mask: Bool[Array, "b s"], buckets: Int[Array, "s s"]) -> tuple[States, None]:
    parts = {"size": self.size, "mesh": self.mesh, "dtype": self.dtype}
    # f32 sums: the stream grows to thousands, where bf16 would lose what a layer adds.
    x = x + SelfAttention(**parts, name="attention")(RMSNorm(name="attention_norm")(x), mask, buckets)
    x = x + GatedMLP(**parts, name="mlp")(RMSNorm(name="mlp_norm")(x))
    return hold(x, self.mesh, P(BATCH, None, None)), None


class UMT5(nn.Module):
  """Token ids -> one vector a token, zeros where the mask is 0."""

  size: TextSize
  mesh: Mesh
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Text:
    size = self.size
    table = self.param("embedding", initializers.normal(1.0), (size.vocabulary, size.width))
    # All ids against a share of the width: the table, a fifth of all weights, never moves.
    x = hold(table[hold(ids, self.mesh, P())], self.mesh, P(None, None, (*WEIGHTS, "tensor")))
    x = hold(x.astype(jnp.float32), self.mesh, P(BATCH, None, None))
    buckets = jnp.asarray(distance_buckets(ids.shape[1], size.buckets, size.far))
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast,) * 2,
                    length=size.layers)
    x, _ = stack(size, self.mesh, self.dtype, name="blocks")(x, mask, buckets)
    return hold(jnp.where(mask[..., None], RMSNorm(name="norm")(x), 0.0), self.mesh, P(BATCH, None, None))


@partial(jax.jit, static_argnums=0)
def encode(network: UMT5, params: PyTree, ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Text:
  """The network, compiled once for all weights: they are an argument."""
  return network.apply({"params": params}, ids, mask)


def abstract_params(network: UMT5) -> PyTree:
  """Shapes of the parameters, float32; nothing is computed."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(network.init, jax.random.key(0), ids, jax.ShapeDtypeStruct((1, 1), jnp.bool_))["params"]


@dataclass(frozen=True)
class TextEncoder:
  """Captions -> text tokens, on the mesh. Weights come with each call and may have any float dtype."""

  network: UMT5
  tokenizer: Tokenizer

  def __call__(self, params: PyTree, captions: Sequence[str], mesh: Mesh | None = None) -> Float[np.ndarray, "b s e"]:
    """This host's captions -> their text tokens, float32, rows of zeros after the last token of a caption.

    mesh: a view of the network's, on which hosts that hold the same parts of a batch have the same captions.
    """
    network = self.network.clone(mesh=mesh or self.network.mesh)
    ids, mask = self.tokenizer(captions)
    work = partial(encode, network, placement.viewed(params, network.mesh))
    return rows.through(network.mesh, work, {"ids": ids, "mask": mask})
