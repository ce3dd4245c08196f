"""Black borders: letterbox, pillarbox, both, of each shot, in pixels of the film.

A few full-size frames of a shot are read. Along each side, in `STRIPS` strips, the first pixels that are ever brighter
than black tell how deep the border is. A border is a straight edge across most strips, with much the same on the
opposite side: the edge of a dark scene is ragged, and a black sky has no black ground below it. A shot too dark to tell
takes the border that most of its film has, if nothing is drawn there.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

STRIPS = 64
DEEPEST = .4     # of the side, what a border may take at one end
STRAIGHT = .5    # share of strips that must begin together ...
TOGETHER = 2     # ... within so many pixels
STRAY = .1       # share of strips that may begin earlier: a logo, a speck
SLIM = .03       # of the side: borders up to this may stand at one end alone
SIDES = ("top", "bottom", "left", "right")


def marks(frame: UInt8[np.ndarray, "h w 3"], black: float) -> Int[np.ndarray, "4 strips"]:
  """Depth in pixels at which each strip of each side (top, bottom, left, right) begins; its whole length if never.

  black: mean of a strip's brightest colour, 0 .. 255, that is still black.
  """
  bright = cv2.max(cv2.max(frame[..., 0], frame[..., 1]), frame[..., 2])
  rows = _strips(bright) > black              # [h, strips]
  columns = _strips(np.ascontiguousarray(bright.T)) > black   # [w, strips]
  sides = [_depth(side) for side in (rows, rows[::-1], columns, columns[::-1])]
  return np.stack(sides).astype(np.int16)


def _strips(bright: UInt8[np.ndarray, "h w"]) -> np.ndarray:
  """Means along each row of STRIPS strips."""
  edges = np.linspace(0, bright.shape[1], min(STRIPS, bright.shape[1]) + 1).astype(int)
  means = np.add.reduceat(bright, edges[:-1], axis=1, dtype=np.float32) / np.diff(edges)
  return np.repeat(means, -(-STRIPS // means.shape[1]), axis=1)[:, :STRIPS]


def _depth(drawn: np.ndarray) -> np.ndarray:
  return np.where(drawn.any(0), drawn.argmax(0), len(drawn))


def boxes(marked: Sequence[Int[np.ndarray, "4 strips"]], weights: Sequence[int], height: int, width: int
          ) -> list[tuple[int, int, int, int]]:
  """The box (top, left, height, width) of each shot, sides even, from its marks, of which the least depth counts.

  weights: frames of each shot, its say in what the film's borders are.
  """
  sides = (height, height, width, width)
  depths = [[_edge(strips, side) for strips, side in zip(each, sides, strict=True)] for each in marked]
  for shot in depths:
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
      if shot[a] is not None and shot[a] > SLIM * sides[a] and (shot[b] or 0) < shot[a] / 3:
        shot[a] = None
  usual = [_usual([shot[n] for shot in depths], weights) for n in range(4)]
  made = []
  for shot, each in zip(depths, marked, strict=True):
    top, bottom, left, right = (
      depth if depth is not None else (usual[n] if np.quantile(each[n], STRAY) >= usual[n] - TOGETHER else 0)
      for n, depth in enumerate(shot))
    rows, columns = height - top - bottom, width - left - right
    made.append((top, left, rows // 2 * 2, columns // 2 * 2))
  return made


def _edge(strips: np.ndarray, side: int) -> int | None:
  """Depth of a border, 0 for none, None where it cannot be told."""
  depth = int(np.quantile(strips, STRAY, method="lower"))
  if depth < TOGETHER:
    return 0
  together = np.abs(strips - depth) <= TOGETHER
  if depth > DEEPEST * side or together.mean() < STRAIGHT:
    return None
  return int(np.median(strips[together]))


def _usual(depths: Sequence[int | None], weights: Sequence[int]) -> int:
  """The depth of most of what can be told of a film; 0 where there is no such majority."""
  told = [(depth, weight) for depth, weight in zip(depths, weights, strict=True) if depth is not None]
  for depth, _ in sorted(told):
    if depth and 2 * sum(w for d, w in told if abs(d - depth) <= TOGETHER) > sum(w for _, w in told):
      return depth
  return 0
