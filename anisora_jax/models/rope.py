"""Rotary positions on three axes: frame, row, column.

A head of width k holds k/2 pairs (2i, 2i+1), shared out to the axes as k - 4(k//6), 2(k//6), 2(k//6) numbers; pair j of
an axis with D numbers turns by position * 10000^(-2j/D). From: Su et al. 2021, arXiv:2104.09864; the split is Wan 2.1's
(wan/modules/model.py, rope_params and rope_apply).
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Num

from anisora_jax.shapes import Heads

BASE = 10000.0


def grid(f: int, h: int, w: int) -> Num[np.ndarray, "f n 3"]:
  """The positions of a clip's tokens: (frame, row, column) of each, rows before columns."""
  frame, row, column = np.meshgrid(np.arange(f), np.arange(h), np.arange(w), indexing="ij")
  return rearrange(np.stack([frame, row, column], axis=-1), "f h w p -> f (h w) p")


def places(segment: Int[Array, "b f"]) -> Int[Array, "b f"]:
  """The number of each frame in its clip, where the frames of a clip, of one number each, stand together."""
  same = segment[:, :, None] == segment[:, None]
  return jnp.arange(segment.shape[1]) - jnp.argmax(same, -1)


def restarted(grid: Num[np.ndarray, "f n 3"], segment: Int[Array, "b f"]) -> Num[Array, "b f n 3"]:
  """The positions of the tokens of rows of several clips: the frames of each count from 0."""
  of_row = jnp.broadcast_to(grid, (len(segment), *grid.shape))
  return of_row.at[..., 0].set(jnp.broadcast_to(places(segment)[..., None], of_row.shape[:-1]))


def turns(positions: Num[Array, "*b f n 3"], width: int) -> tuple[Float[Array, "*b f n p"], Float[Array, "*b f n p"]]:
  """cos and sin of every pair's angle, p = width / 2."""
  shares = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
  # f32: bf16 counts exactly only to 256, and a position times a frequency must keep its fraction.
  angles = [positions[..., axis, None].astype(jnp.float32) * jnp.asarray(BASE ** (-np.arange(0, share, 2) / share),
                                                                       jnp.float32)
            for axis, share in enumerate(shares)]
  angle = jnp.concatenate(angles, axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Heads, cos: Float[Array, "... f n p"], sin: Float[Array, "... f n p"]) -> Heads:
  """Turns every pair of x by its token's angles."""
  pairs = rearrange(x.astype(jnp.float32), "b f n a (p two) -> two b f n a p", two=2)
  cos, sin = cos[..., None, :], sin[..., None, :]
  turned = jnp.stack([pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos], axis=-1)
  return rearrange(turned, "b f n a p two -> b f n a (p two)").astype(x.dtype)
