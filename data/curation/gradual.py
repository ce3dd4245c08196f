"""Fades and dissolves: stretches where a film walks straight from one picture to another.

In a dissolve picture k is (1 - a) A + a B, with a rising evenly from 0 to 1, whatever A and B show; a fade is the same
with one flat end. So for every pair (A, B) of up to `LONGEST` seconds, the pictures between are projected on the line
through both, in a space of tiny pictures where slow motion hardly shows: a pair is a candidate if they lie near that
line and evenly along it. All products come from one Gram matrix. What moves may look so too, but then its middle
picture can be had by moving the pixels of A or B, as optical flow does, better than by mixing them.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from curation import likeness

RATE = 12       # pictures a second in which candidates are searched
LONGEST = 2.6   # seconds
HELD = .15      # seconds for which a drawing may stay in the midst of a dissolve: threes at 24 frames a second
BRIEF = .2      # seconds: no shot fits between two transitions so near each other
ROWS = 18       # of the tiny pictures
COST = .5       # largest distance from the line, in lengths of the line, and from an even walk, together
FADE_COST = .3
LONGER = .015   # of cost that each further picture makes up for
STEP = .5       # of the way in one picture, which would be a cut
FLAT, DRAWN = 7., 12.   # spread of the grey levels of a flat picture, at most, and of one that is not, at least
APART = 20.     # root mean square difference of the ends of a dissolve, grey levels
ALIKE = .7      # correlation of the ends that one scene could have
ENDS = .4       # share of one end that motion must leave unexplained by the other
MIXED = 1.05     # error of mixing over error of moving, at most


@dataclass(frozen=True)
class Transition:
  """kind: cut, fade or dissolve. Frames [start, stop) belong to no scene; a cut has start == stop, mostly."""
  kind: str
  start: int
  stop: int


def tiny(small: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
  """Each picture as one vector of a few hundred numbers, 0 .. 255."""
  columns = max(4, round(small.shape[2] * ROWS / small.shape[1]))
  made = [cv2.resize(picture, (columns, ROWS), interpolation=cv2.INTER_AREA) for picture in small]
  return np.stack(made).reshape(len(small), -1).astype(np.float32)


def spread(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
  """Standard deviation of each picture's grey levels about its own colours."""
  pixels = vectors.reshape(len(vectors), -1, 3)
  return (pixels - pixels.mean(1, keepdims=True)).std((1, 2))


def find(small: UInt8[np.ndarray, "n h w 3"], fps: float, first: int = 0) -> list[Transition]:
  """Fades and dissolves in a stretch of small frames, as frames of the stretch. first: the film's number of frame 0."""
  step = max(1, round(fps / RATE))
  phase = -first % step  # samples do not depend on where the stretch begins
  vectors = tiny(small)
  found: list[Transition] = []
  refused: list[tuple[int, int]] = []
  for _, start, stop in _candidates(vectors[phase::step], round(LONGEST * fps / step)):
    start, stop = start * step + phase, stop * step + phase
    if any(start < other.stop and other.start < stop for other in found) or any(
        abs(start - other[0]) + abs(stop - other[1]) <= 3 * step for other in refused):
      continue
    if _is_mixed(small, start, stop):
      found.append(_grown(vectors, start, stop, round(HELD * fps)))
    else:
      refused.append((start, stop))
  return _joined(sorted(found, key=lambda t: t.start), small, spread(vectors) < FLAT, fps)


def _candidates(vectors: Float[np.ndarray, "n d"], longest: int) -> list[tuple[float, int, int]]:
  """(cost, first, last) of pairs whose pictures between lie along their line, the best first, then the longest."""
  centred = vectors - vectors.mean(0)
  products = centred @ centred.T
  norms, spreads = np.diag(products), spread(vectors)
  pixels = vectors.reshape(len(vectors), -1, 3)
  shapes = (pixels - pixels.mean(1, keepdims=True)).reshape(vectors.shape) / np.maximum(spreads, 1.)[:, None]
  likes, found = shapes @ shapes.T / vectors.shape[1], []
  for length in range(3, min(longest, len(vectors) - 1) + 1):
    a = np.arange(len(vectors) - length)
    b, between = a + length, a[:, None] + np.arange(1, length)
    apart = np.maximum(norms[a] + norms[b] - 2 * products[a, b], 1.)
    along = (products[between, b[:, None]] - products[between, a[:, None]] + (norms[a] - products[a, b])[:, None])
    share = along / apart[:, None]
    off = norms[between] + norms[a][:, None] - 2 * products[between, a[:, None]] - share * along
    cost = np.sqrt(np.maximum(off, 0) / apart[:, None]).max(1) + np.abs(share - np.arange(1, length) / length).max(1)
    even = np.diff(share, axis=1, prepend=0., append=1.).max(1) < STEP
    low, high = np.minimum(spreads[a], spreads[b]), np.maximum(spreads[a], spreads[b])
    fades = (cost < FADE_COST) & (low < FLAT) & (high > DRAWN)
    wide = np.sqrt(apart / vectors.shape[1]) > APART
    dissolves = (cost < COST) & even & wide & (likes[a, b] < ALIKE) & (low >= FLAT) & (length > 3)
    # A longer fit that is little worse leaves less to be guessed.
    found += [(float(cost[n]) - LONGER * length, int(n), int(n) + length) for n in np.flatnonzero(fades | dissolves)]
  return sorted(found)


def _is_mixed(small: UInt8[np.ndarray, "n h w 3"], start: int, stop: int) -> bool:
  """Whether the ends are of two scenes, and what lies between is better mixed from them than moved from one of them.

  Of a fade no light is taken away: a flat end is what little light, or much, makes of any scene.
  """
  a, b = small[start], small[stop]
  fade = spread(tiny(small[[start, stop]])).min() < FLAT
  if not fade and likeness.unexplained(a, b) < ENDS:
    return False
  way, ratios = b.astype(np.float32) - a, []
  for share in (.25, .5, .75):
    picture = small[round(start + share * (stop - start))].astype(np.float32)
    share = float(np.clip((way * (picture - a)).sum() / max((way**2).sum(), 1.), 0, 1))
    ratios.append(np.abs(a + share * way - picture).mean() / max(_moved(a, b, picture.astype(np.uint8), not fade), .1))
  return float(np.median(ratios)) < MIXED


def _moved(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"], picture: UInt8[np.ndarray, "h w 3"],
           lit: bool) -> float:
  """Mean difference of a picture from the better of two others, moved, and lit, to be like it."""
  sources = [a, b, *([likeness.lit(end, picture) for end in (a, b)] if lit else [])]
  return min(float(np.abs(likeness.moved(each, picture).astype(np.float32) - picture).mean()) for each in sources)


def _grown(vectors: Float[np.ndarray, "n d"], start: int, stop: int, held: int) -> Transition:
  """The whole transition around a stretch of it: as far as pictures go on along its line.

  held: frames for which a drawing may stay.
  """
  way = vectors[stop] - vectors[start]
  share = (vectors - vectors[start]) @ way / float(way @ way)
  stride = max(2, held, (stop - start) // 6)
  slope = (share[stop] - share[start]) / (stop - start)
  first, last = start, stop
  reach = (stop - start) + stride
  while first - stride >= 0 and start - first < reach and share[first] - share[first - stride] > .4 * slope * stride:
    first -= 1
  while last + stride < len(share) and last - stop < reach and share[last + stride] - share[last] > .4 * slope * stride:
    last += 1
  drawn = spread(vectors[[max(0, first - 1), min(len(vectors) - 1, last + 1), start, stop]])
  return Transition("fade" if drawn.min() < FLAT else "dissolve", first, last + 1)


def _joined(found: list[Transition], small: UInt8[np.ndarray, "n h w 3"], flat: np.ndarray, fps: float
            ) -> list[Transition]:
  """Joins a fade out, the flat pictures after it and the fade in, and parts of one transition. Drops short ones that
  come back to their scene."""
  joined: list[Transition] = []
  for each in found:
    start, stop = each.start, each.stop
    while each.kind == "fade" and start > 0 and flat[start - 1]:
      start -= 1
    while each.kind == "fade" and stop < len(flat) and flat[stop]:
      stop += 1
    if joined and start <= joined[-1].stop + BRIEF * fps:
      before = joined.pop()
      kind = "fade" if "fade" in (before.kind, each.kind) else "dissolve"
      each = Transition(kind, before.start, max(stop, before.stop))
    else:
      each = Transition(each.kind, start, stop)
    joined.append(each)
  return [each for each in joined if each.stop - each.start > fps or each.start == 0 or each.stop >= len(small)
          or likeness.unexplained(small[each.start - 1], small[each.stop]) > likeness.OTHER]
