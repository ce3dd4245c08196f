"""A shot's frames without the borders around it, read no larger than they are needed."""

from collections.abc import Collection, Iterator

import numpy as np
from jaxtyping import UInt8

from curation import frames
from curation.items import Film, Shot


def pictures(film: Film, shot: Shot, side: int, numbers: Collection[int]
             ) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
  """Some frames of a shot inside its box, with their numbers, which count from its start.

  side: pixels, about, of the box's smaller side; the film's own where it has fewer. Raises video.Unreadable.
  """
  top, left, height, width = shot.box
  rows = min(film.height, -(-side * film.height // min(height, width)) // 2 * 2 + 2)
  scale = rows / film.height
  down, across = (slice(round(first * scale), max(round(first * scale) + 1, round((first + size) * scale)))
                  for first, size in ((top, height), (left, width)))
  for number, picture in frames.pictures(film, shot.start, shot.stop):
    if number - shot.start in numbers:
      yield number - shot.start, frames.shown(picture, film, rows)[down, across]
