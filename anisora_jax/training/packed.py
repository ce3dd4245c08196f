"""Rows of several clips, one after the other along the frames: what is drawn for each clip, laid out on its row.

A batch of such rows has "segment", the number of each frame's clip in its row, counted from 0, and -1 where there is
none; "ok" `[b, k]`, "text" `[b, k, s, e]` and "image" `[b, k, i, y]` are of the clips. Draws are of clips, as if each
had a row of its own, so that packing changes neither loss nor gradients.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Shaped

from anisora_jax.models import rope


@struct.dataclass
class Layout:
  """segment, place: the number of each frame's clip in its row, and of each frame in its clip. lengths: of clips."""

  segment: Int[Array, "b f"]
  place: Int[Array, "b f"]
  lengths: Int[Array, "clips"]

  def frames(self, x: Shaped[Array, "clips f ..."]) -> Shaped[Array, "b f ..."]:
    """What was drawn for the frames of each clip, laid out on the rows. Frames of no clip take the first clip's."""
    rows = x.reshape(len(self.segment), -1, *x.shape[1:])
    return jax.vmap(lambda row, clip, place: row[clip, place])(rows, jnp.maximum(self.segment, 0), self.place)

  def clips(self, x: Shaped[Array, "b k ..."]) -> Shaped[Array, "b f ..."]:
    """What each clip has, at each of its frames; 0 at frames of no clip."""
    rows = jax.vmap(lambda row, clip: row[clip])(x, jnp.maximum(self.segment, 0))
    seen = (self.segment >= 0).reshape(*self.segment.shape, *[1] * (x.ndim - 2))
    return jnp.where(seen, rows, jnp.zeros_like(rows))


def layout(batch: Mapping[str, Array]) -> Layout | None:
  """How the clips of a batch lie on its rows; None for one clip a row."""
  if "segment" not in batch:
    return None
  segment, k = batch["segment"], batch["ok"].shape[1]
  lengths = (segment[:, None] == jnp.arange(k)[:, None]).sum(-1)
  return Layout(segment, rope.places(segment), lengths.reshape(-1))
