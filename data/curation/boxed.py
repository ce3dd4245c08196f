"""A shot's frames without the borders around it, read no larger than they are needed."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from curation import frames
from curation.items import Film, Shot


def pictures(film: Film, shot: Shot, side: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """The frames of a shot inside its box, whose smaller side has about `side` pixels, or the film's own where that has
  fewer. Raises video.Unreadable."""
  top, left, height, width = shot.box
  rows = min(film.height, -(-side * film.height // min(height, width)) // 2 * 2 + 2)
  scale = rows / film.height
  down, across = (slice(round(first * scale), max(round(first * scale) + 1, round((first + size) * scale)))
                  for first, size in ((top, height), (left, width)))
  for _, picture in frames.paced(film, shot.start, shot.stop, rows):
    yield picture[down, across]
