"""A chosen shot as a clip: cropped, scaled, encoded so that it decodes alone, with the tracked character if known.

Clips wait in the store's clips/KEY under a hash of all that decides their pixels; another choice of shots encodes only
those that are new.
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records, video
from curation import frames, sources
from curation.items import Candidate, Film, Shot, Source
from curation.store import Store, digest, land


@dataclass(frozen=True)
class Settings:
  """height, width: of the clips in pixels; 0 keeps the shot's shape, and with both 0 its size. crf: of their H.264."""
  height: int = 0
  width: int = 0
  crf: int = 15

  def __post_init__(self):
    for name, high in {"height": 8192, "width": 8192, "crf": 51}.items():
      if not 0 <= getattr(self, name) <= high:
        raise BadInput(f"clip.{name} is {getattr(self, name)}: allowed are 0 to {high}.")
    for name in ("height", "width"):
      if getattr(self, name) % 2:
        raise BadInput(f"clip.{name} is {getattr(self, name)}: H.264 in yuv420p needs an even number of pixels.")


def size_of(shot: Shot, settings: Settings) -> video.Size:
  """The clip's size: as asked, or of the shot's shape; even."""
  _, _, rows, columns = shot.box
  height, width = settings.height, settings.width
  if not height:
    height = round(rows * width / columns) if width else rows
  width = width or round(columns * height / rows)
  return video.Size(max(2, height // 2 * 2), max(2, width // 2 * 2))


def encode(film: Film, shot: Shot, settings: Settings) -> bytes:
  """The mp4 of a shot; one frame at a time is in memory. Raises video.Unreadable."""
  top, left, rows, columns = shot.box
  size = size_of(shot, settings)
  pictures = (video.fit(picture[top:top + rows, left:left + columns], size)
              for _, picture in frames.paced(film, shot.start, shot.stop))
  return video.encode_each(pictures, size, film.fps, settings.crf)


def character(path: Path, film: Film, shot: Shot, settings: Settings) -> bytes | None:
  """Where the tracked character is seen in a clip, packed as in a record; None where no masks lie beside the film.

  The file is what data/toons.py writes: "visible", bits of [frames, height, width], and "shape". Raises
  video.Unreadable where it is damaged or of another film.
  """
  if not path.is_file():
    return None
  try:
    with np.load(path, allow_pickle=False) as file:
      count, height, width = (int(n) for n in file["shape"])
      bits = file["visible"]
  except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
    raise video.Unreadable(f"the masks beside it are damaged ({error})") from error
  if (count, height // 2 * 2, width // 2 * 2) != (film.frames, film.height, film.width):
    raise video.Unreadable(f"the masks beside it are of {count} frames of {height}x{width}, the film is shown as "
                           f"{film.frames} of {film.height}x{film.width}")
  first = shot.start * height * width  # of the bits; it need not begin a byte
  chosen = np.unpackbits(bits[first // 8:-(-shot.stop * height * width // 8)])[first % 8:]
  length = shot.stop - shot.start
  top, left, rows, columns = shot.box
  whole = chosen[:length * height * width].reshape(length, height, width)[:, top:top + rows, left:left + columns]
  size = size_of(shot, settings)
  return records.pack_mask(np.stack([video.fit_mask(mask.astype(bool), size) for mask in whole]))


class Held:
  """The encoded clips of one film."""

  def __init__(self, store: Store, source: Source, film: Film, settings: Settings):
    self._film, self._settings, self._masks = film, settings, Path(source.path).with_suffix(sources.MASKS)
    self._folder = store.folder / "clips" / source.key
    self._needs = [replace(film, path="", frames=0), settings, sources.beside_state(source, [sources.MASKS])]

  def path(self, shot: Shot) -> Path:
    return self._folder / f"{shot.start:06}-{digest(*self._needs, shot)[:24]}.mp4"

  def make(self, candidate: Candidate) -> None:
    """Encodes a clip unless that is done. Raises video.Unreadable."""
    path = self.path(candidate.shot)
    if path.is_file():
      return
    if not (masked := path.with_suffix(".mask")).is_file():
      mask = character(self._masks, self._film, candidate.shot, self._settings)
      if mask is not None:
        land(masked, mask)
    land(path, encode(self._film, candidate.shot, self._settings))
