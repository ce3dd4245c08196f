"""A film's shots: between its cuts, fades and dissolves, without stills at their ends and without black borders.

One pass over the film, on small pictures; a full-size one now and then, for the borders. A window of some seconds of
small pictures is held, and of the whole film only where pictures change and what its borders are.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from anisora_jax import errors
from curation import borders, frames, transitions
from curation.gradual import Transition
from curation.items import Film, Rejected, Shot

AREA = 72 * 128    # pixels of the small pictures: cuts, motion and stills are seen as well as in large ones
CELL = 6           # pixels of the small picture: a still has no cell of this size that changes by ...
CHANGE = 6.        # ... more than so many grey levels on average
LOOK = 1.          # seconds between the frames in which borders are looked for
GUARD = .1         # seconds left out beside fades and dissolves, whose ends can be off by a few frames
REASONS = {
  "too_short": "shorter than `shortest`, as it is or after stills were taken off",
  "static": "nothing moves, or for less than a quarter of `shortest`",
}


@dataclass(frozen=True)
class Settings:
  """What a shot must be.

  shortest, longest: seconds; longer shots are divided evenly. content: change of hue, saturation and value, 0 .. 255,
  from which PySceneDetect's ContentDetector suspects a cut; adaptive: the same of AdaptiveDetector, in multiples of
  the change around it. still: seconds without change from which the ends of a shot are trimmed; freeze: and from which
  a shot is divided. black: brightness, 0 .. 255, up to which a border is black.
  """
  shortest: float = 2.
  longest: float = 20.
  content: float = 20.
  adaptive: float = 2.
  still: float = .5
  freeze: float = 1.5
  black: float = 14.

  def __post_init__(self):
    for name, (low, high) in {"shortest": (.1, 60), "longest": (.2, 3600), "content": (5, 100), "adaptive": (1, 20),
                              "still": (.2, 10), "freeze": (.4, 60), "black": (1, 64)}.items():
      if not low <= getattr(self, name) <= high:
        raise errors.BadInput(f"cut.{name} is {getattr(self, name)}: allowed are {low} to {high}.")
    if self.longest < 2 * self.shortest:
      raise errors.BadInput(f"cut.longest is {self.longest}, cut.shortest {self.shortest}: take at least twice the "
                            "shortest, so that what is divided is long enough.")
    if self.freeze < self.still:
      raise errors.BadInput(f"cut.freeze is {self.freeze}, cut.still {self.still}: take no less than cut.still.")


@dataclass
class _Seen:
  """What one pass leaves: frames, transitions, the frames at which the picture changes, marks of borders by frame."""
  count: int
  found: list[Transition]
  changes: list[int]
  marks: dict[int, np.ndarray]


def cut(film: Film, settings: Settings) -> tuple[list[Shot], list[Rejected], int]:
  """Shots in order, what was turned away, and the number of frames that can be decoded. Raises video.Unreadable."""
  seen = _look(film, settings)
  pieces, rejected = [], []
  for opens, start, stop in _scenes(seen, film.fps):
    made = list(_pieces(seen, (opens, start, stop), film.fps, settings))
    for name, first, last in made:
      if last - first < round(settings.shortest * film.fps):
        moves = last - first >= settings.shortest * film.fps / 4 or not _held(seen, start, stop)
        reason = "too_short" if moves else "static"
        detail = f"{(last - first) / film.fps:.2f} s of {(stop - start) / film.fps:.2f} s"
        rejected.append(Rejected(f"{film.name}/{first:06}", film.name, "cut", reason, detail))
      else:
        pieces += _divided((name, first, last), film.fps, settings)
  marked = [_marks_of(film, seen, start, stop) for _, start, stop in pieces]
  boxes = borders.boxes(marked, [stop - start for _, start, stop in pieces], film.height, film.width)
  shots = [Shot(film.name, start, stop, box, opens) for (opens, start, stop), box in zip(pieces, boxes, strict=True)]
  return shots, rejected, seen.count


def small_height(film: Film) -> int:
  """Rows of the small pictures, even: as many pixels of upright films as of wide ones, of tiny ones as of large."""
  return round(math.sqrt(AREA * film.height / film.width) / 2) * 2


def _look(film: Film, settings: Settings) -> _Seen:
  """The one pass over the film."""
  finder = transitions.Finder(film.fps, settings.content, settings.adaptive)
  seen, rows, every = _Seen(0, [], [], {}), small_height(film), max(1, round(LOOK * film.fps))
  last, small, anchor = None, None, None
  for number, picture in frames.pictures(film):
    if picture is not last:
      last, small = picture, frames.shown(picture, film, rows)
    if anchor is None or (small is not anchor and changed(anchor, small)):
      anchor = small
      seen.changes.append(number)
    if number % every == 0:
      seen.marks[number] = borders.marks(frames.shown(picture, film), settings.black)
    seen.found += finder.push(number, small)
    seen.count = number + 1
  seen.found += finder.end()
  return seen


def changed(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether any cell of a picture differs. A mouth that speaks does; the noise of an encoder does not."""
  size = (max(1, a.shape[1] // CELL), max(1, a.shape[0] // CELL))
  return bool(cv2.resize(cv2.absdiff(a, b), size, interpolation=cv2.INTER_AREA).mean(-1).max() > CHANGE)


def _scenes(seen: _Seen, fps: float) -> Iterator[tuple[str, int, int]]:
  """(how it opens, start, stop) of what lies between transitions."""
  opens, start, guard = "start", 0, round(GUARD * fps)
  for each in [*seen.found, Transition("end", seen.count, seen.count)]:
    soft = guard if each.kind in ("fade", "dissolve") else 0
    if each.start - soft > start:
      yield opens, start, each.start - soft
    opens, start = each.kind, max(start, each.stop + soft)


def _runs(seen: _Seen, start: int, stop: int) -> Iterator[tuple[int, int]]:
  """Runs of frames without change in [start, stop)."""
  first = int(np.searchsorted(seen.changes, start, side="right"))
  edges = [start, *(n for n in seen.changes[first:int(np.searchsorted(seen.changes, stop))]), stop]
  yield from itertools.pairwise(edges)


def _held(seen: _Seen, start: int, stop: int) -> bool:
  """Whether most of a scene is one picture."""
  return 2 * max((b - a for a, b in _runs(seen, start, stop)), default=0) > stop - start


def _pieces(seen: _Seen, scene: tuple[str, int, int], fps: float, settings: Settings) -> Iterator[tuple[str, int, int]]:
  """A scene without stills at its ends, and divided where it freezes; one piece at least, maybe of a single frame."""
  opens, start, stop = scene
  runs = list(_runs(seen, start, stop))
  if runs[0][1] - start >= settings.still * fps:
    start = runs[0][1] - 1  # of a held picture the last frame stays: from there it moves
  if stop - runs[-1][0] >= settings.still * fps:
    stop = max(start, runs[-1][0]) + 1
  for a, b in runs[1:-1]:
    if b - a >= settings.freeze * fps:
      yield opens, start, a + 1
      opens, start = "split", b - 1
  yield opens, start, stop


def _divided(piece: tuple[str, int, int], fps: float, settings: Settings) -> list[tuple[str, int, int]]:
  """A piece in even parts, none longer than the longest allowed."""
  opens, start, stop = piece
  parts = math.ceil((stop - start) / max(1, math.floor(settings.longest * fps + 1e-6)))
  edges = [start + (stop - start) * n // parts for n in range(parts + 1)]
  return [("split" if n else opens, edges[n], edges[n + 1]) for n in range(parts)]


def _marks_of(film: Film, seen: _Seen, start: int, stop: int) -> np.ndarray:
  """Where each strip first shows anything in a shot, over the frames that were looked at."""
  every = max(1, round(LOOK * film.fps))
  looked = [seen.marks[n] for n in range(-(-start // every) * every, stop, every) if n in seen.marks]
  if not looked:  # a shot shorter than the time between two looks: nothing is known, nothing is cropped
    return np.zeros((4, borders.STRIPS), np.int16)
  return np.min(looked, axis=0)
