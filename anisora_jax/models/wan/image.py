"""The CLIP image encoder of Wan 2.1: frames -> image tokens that the video transformer reads.

A vision transformer (patches, a class token, learned positions, pre-norm blocks) of which Wan takes the tokens of the
last block but one, without the closing norm. From: Radford et al. 2021, arXiv:2103.00020; weights: open_clip, XLM-R
ViT-H/14, as in Wan 2.1, wan/modules/clip.py.
"""

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
from jaxtyping import Array, Float, PyTree

from anisora_jax.errors import BadInput
from anisora_jax.models.blocks import MLP, SPREAD, LayerNorm, linear, to_patches
from anisora_jax.parallel import rows
from anisora_jax.parallel.mesh import BATCH
from anisora_jax.parallel.placement import hold

EPS = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's images, red green blue in 0 .. 1
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

Image = Float[Array, "b H W 3"]
ImageStates = Float[Array, "b i d"]


@dataclass(frozen=True)
class ImageSize:
  """Everything that fixes the shapes of the encoder's parameters. side: of the square image; patch: of a token."""

  layers: int
  width: int
  heads: int
  mlp: int
  patch: int = 14
  side: int = 224

  def __post_init__(self):
    if self.side % self.patch or self.width % self.heads:
      raise BadInput(f"an image of {self.side} does not divide into patches of {self.patch}, or a width of "
                     f"{self.width} into {self.heads} heads: choose sizes that divide.")

  @property
  def tokens(self) -> int:
    """One for the class, then one a patch, row by row."""
    return 1 + (self.side // self.patch) ** 2


IMAGE_SIZES = {
  "clip_vit_h": ImageSize(layers=32, width=1280, heads=16, mlp=5120),
}


def cubic(given: int, wanted: int) -> Float[np.ndarray, "wanted given"]:
  """The matrix that resizes a row of pixels: four neighbours each, the outermost repeated past the edge.

  The kernel keeps its width where the row shrinks, so fine detail aliases: torch's "bicubic" with antialias off, on
  which Wan trained. diffusers' image processor (antialiased, cropped to a square) makes other tokens.
  From: Keys 1981, doi:10.1109/TASSP.1981.1163711, with a = -0.75.
  """
  a, matrix = -0.75, np.zeros((wanted, given))
  place = (np.arange(wanted) + 0.5) * given / wanted - 0.5
  for step in (-1, 0, 1, 2):
    pixel = np.floor(place).astype(int) + step
    x = np.abs(place - pixel)
    inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    np.add.at(matrix, (np.arange(wanted), np.clip(pixel, 0, given - 1)), np.where(x <= 1, inner, outer))
  return matrix.astype(np.float32)


def prepare(frames: Image, side: int) -> Float[Array, "b {side} {side} 3"]:
  """Frames in [-1, 1], of any sides -> squares with the mean and deviation of CLIP's images, in f32.

  A frame that is not square is squeezed, not cropped. What bicubic overshoots is kept, as upstream keeps it.
  """
  _, height, width, _ = frames.shape
  # Highest: by default a TPU multiplies in bf16, which is coarser than the 256 steps of a pixel.
  square = jnp.einsum("yH,bHWc,xW->byxc", cubic(height, side), frames.astype(jnp.float32), cubic(width, side),
                      precision=lax.Precision.HIGHEST)
  return (square * 0.5 + 0.5 - np.float32(MEAN)) / np.float32(DEVIATION)


class Block(nn.Module):
  """One layer, in the form of a scan: tokens in, tokens out. dtype: of the products; norms and sums are f32."""

  size: ImageSize
  mesh: Mesh
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: ImageStates) -> tuple[ImageStates, None]:
    size = self.size
    # One kernel for all three, whole over tensor: split there it would part q from k, not head from head.
    qkv = linear(3 * size.width, "qkv", self.dtype, self.mesh)(LayerNorm(EPS, name="attention_norm")(x))
    q, k, v = rearrange(qkv, "b i (three a k) -> three b i a k", three=3, a=size.heads)
    o = rearrange(jax.nn.dot_product_attention(q, k, v, implementation="xla"), "b i a k -> b i (a k)")
    x = x + linear(size.width, "o", self.dtype, self.mesh)(o)
    exact = partial(nn.gelu, approximate=False)
    mlp = MLP(size.mlp, size.width, self.dtype, self.mesh, activation=exact, name="mlp")
    x = x + mlp(LayerNorm(EPS, name="mlp_norm")(x))
    return hold(x, self.mesh, P(BATCH, None, None)), None


class CLIPVision(nn.Module):
  """Prepared images -> (their tokens after all blocks but the last, CLIP's closing summary of each image).

  Wan reads the tokens. The summary (last block, norm, class token) is there so that weights survive a round trip;
  where it is not used, the compiler leaves it out.
  """

  size: ImageSize
  mesh: Mesh
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: Image) -> tuple[ImageStates, Float[Array, "b d"]]:
    size, parts = self.size, (self.size, self.mesh, self.dtype)
    patches = to_patches(images[:, None], size.patch)[:, 0]
    kernel = self.param("patch_in", SPREAD, (3 * size.patch**2, size.width))
    patches = patches.astype(self.dtype) @ hold(kernel, self.mesh, P()).astype(self.dtype)
    small = initializers.normal(size.width**-0.5)
    first = jnp.broadcast_to(self.param("class", small, (size.width,)), (len(images), 1, size.width))
    x = jnp.concatenate([first, patches.astype(jnp.float32)], axis=1)
    x = LayerNorm(EPS, name="norm_in")(x + self.param("positions", small, (size.tokens, size.width)))
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.layers - 1)
    tokens, _ = stack(*parts, name="blocks")(hold(x, self.mesh, P(BATCH, None, None)))
    last, _ = Block(*parts, name="last")(tokens)
    return tokens, LayerNorm(EPS, name="norm_out")(last[:, 0])


@partial(jax.jit, static_argnums=0)
def encode(network: CLIPVision, params: PyTree, frames: Image) -> ImageStates:
  """Frames in [-1, 1] -> image tokens, compiled once for all weights: they are an argument."""
  return network.apply({"params": params}, prepare(frames, network.size.side))[0]


def abstract_params(network: CLIPVision) -> PyTree:
  """Shapes of the parameters, float32; nothing is computed."""
  images = jax.ShapeDtypeStruct((1, network.size.side, network.size.side, 3), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), images)["params"]


@dataclass(frozen=True)
class ImageEncoder:
  """Frames -> image tokens, on the mesh. Weights come with each call and may have any float dtype."""

  network: CLIPVision

  def __call__(self, params: PyTree, frames: Float[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b i d"]:
    """This host's frames, in [-1, 1] -> their image tokens, float32: one of the whole, then one a patch."""
    work = partial(encode, self.network, params)
    return rows.through(self.network.mesh, work, {"frames": np.asarray(frames, np.float32)})
