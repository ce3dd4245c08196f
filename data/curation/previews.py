"""A few seconds of a shot to play in the report, and a picture to stand there before."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from anisora_jax.loaders import video
from curation import frames, report
from curation.items import Film
from curation.store import digest, land

RATE, CRF = 15, 28  # frames a second at most, quality


@dataclass(frozen=True)
class Preview:
  """A few seconds of a film to play. name: of the files, without suffix."""
  film: Film
  start: int
  stop: int
  box: tuple[int, int, int, int]
  settings: report.Settings

  @property
  def name(self) -> str:
    stop = min(self.stop, self.start + max(1, round(self.settings.seconds * self.film.fps)))
    return digest(self.film.sha, self.film.fps, self.start, stop, self.box, self.settings.rows)[:24]


def render(preview: Preview, folder: Path) -> None:
  """Writes NAME.jpg and NAME.mp4. Raises video.Unreadable."""
  film, rows = preview.film, min(preview.settings.rows, preview.film.height) // 2 * 2
  scale, every = rows / film.height, max(1, math.ceil(film.fps / RATE - 1e-6))
  top, left, height, width = preview.box
  size = video.Size(max(2, round(height * scale) // 2 * 2), max(2, round(width * scale) // 2 * 2))
  stop = min(preview.stop, preview.start + max(1, round(preview.settings.seconds * film.fps)))
  corner = round(top * scale), round(left * scale)
  shown = [video.fit(picture[corner[0]:corner[0] + size.height, corner[1]:corner[1] + size.width], size)
           for number, picture in frames.paced(film, preview.start, stop, rows)
           if (number - preview.start) % every == 0]
  poster = io.BytesIO()
  Image.fromarray(shown[len(shown) // 2]).save(poster, "JPEG", quality=85)
  land(folder / f"{preview.name}.jpg", poster.getvalue())
  land(folder / f"{preview.name}.mp4", video.encode(np.stack(shown), film.fps / every, CRF))
