"""Work on a clip in overlapping tiles of one size, blended where they overlap: memory is that of one tile."""

from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Clip = Float[Array, "b f h w c"]
Made = Float[Array, "b f2 h2 w2 c2"]


def starts(length: int, tile: int, overlap: int) -> Int[np.ndarray, "k"]:
  """Where the tiles that cover `length` begin: tile - overlap apart, the last moved back so that it ends there too."""
  return np.minimum(np.arange(0, max(1, length - overlap), tile - overlap), max(0, length - tile))


def weights(length: int, tile: int, overlap: int) -> Float[np.ndarray, "k tile"]:
  """How much each place of each tile counts; at every place of `length` they sum to 1.

  Where two tiles overlap by `overlap`, that of the later one climbs 0, 1/overlap, 2/overlap, ...
  """
  begins = starts(length, tile, overlap)
  if len(begins) == 1:
    return np.ones((1, length), np.float32)
  counts, total = np.ones((len(begins), tile)), np.zeros(length)
  counts[1:, :overlap] = np.arange(overlap) / max(1, overlap)
  counts[:-1, tile - overlap:] *= 1 - np.arange(overlap) / max(1, overlap)
  places = begins[:, None] + np.arange(tile)
  np.add.at(total, places, counts)
  return (counts / total[places]).astype(np.float32)


def blend(work: Callable[[Clip], Made], x: Clip, tile: int, overlap: int, cell: tuple[int, int]) -> Made:
  """`work` on one tile after another, put together again.

  tile, overlap: rows and columns, in cells. cell: how many rows, or columns, of x and of the result are one cell.
  """
  taken, given = cell
  sides = [n // taken for n in x.shape[2:4]]
  high, wide = (min(tile, n) * taken for n in sides)

  def put(canvas: Made, place: tuple) -> tuple[Made, None]:
    (row, down), (column, across) = place
    cut = lax.dynamic_slice(x, (0, 0, row * taken, column * taken, 0), (*x.shape[:2], high, wide, x.shape[-1]))
    made, at = work(cut) * down[:, None, None] * across[:, None], (0, 0, row * given, column * given, 0)
    return lax.dynamic_update_slice(canvas, lax.dynamic_slice(canvas, at, made.shape) + made, at), None

  one = jax.eval_shape(work, jax.ShapeDtypeStruct((*x.shape[:2], high, wide, x.shape[-1]), x.dtype))
  canvas = jnp.zeros((*one.shape[:2], *(n * given for n in sides), one.shape[-1]), one.dtype)
  places = [list(zip(starts(n, tile, overlap), weights(n * given, tile * given, overlap * given), strict=True))
            for n in sides]
  return lax.scan(put, canvas, jax.tree.map(lambda *each: np.stack(each), *product(*places)))[0]
