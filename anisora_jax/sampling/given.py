"""Stills, films and masks that a user gives, brought to the size of the film to make."""

import warnings
from collections import deque
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from anisora_jax.errors import BadInput, pick
from anisora_jax.loaders import video
from anisora_jax.sampling.film import Film

Picture = UInt8[np.ndarray, "H W 3"]
Fitted = UInt8[np.ndarray, "h w 3"]

FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
TOLERANCE = 0.02  # of the aspect, within which a picture is stretched unasked


def _there(path: Path, what: str) -> None:
  if not path.exists():
    raise BadInput(f"{what} {path} does not exist: check the path.")
  if not path.is_file():
    raise BadInput(f"{what} {path} is not a file: give a png, jpg or mp4.")


def _still(path: Path, ground: str) -> Image.Image:
  """A still as 8-bit RGB, turned upright; what is transparent shows `ground`."""
  _there(path, "image")
  try:
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(path) as image:
      image = ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16-bit grey, of which convert() would keep the low byte
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
      image = image.convert("RGBA")
      return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
  except UnidentifiedImageError:
    raise BadInput(f"{path} is not an image: give a png or jpg.") from None
  except (Image.DecompressionBombWarning, Image.DecompressionBombError):
    raise BadInput(f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels: give a smaller image.") from None
  except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damage, by format
    raise BadInput(f"{path} is damaged ({error}): give a png or jpg that opens.") from error


def read_image(path: str | Path) -> Picture:
  """A png or jpg, upright, what is transparent on white. Raises BadInput."""
  return np.asarray(_still(Path(path), "white"))


def read_film(path: str | Path, fps: float | None = None, count: int | None = None, end: bool = False) -> Film:
  """The frames of a film.

  fps: rate to take them at, nothing blended; None takes every frame. count: how many at most, from the start or, with
  `end`, up to the last. Raises BadInput also when the film has fewer than `count`.
  """
  path = Path(path)
  _there(path, "film")
  try:
    pace = (video.facts(path).fps / fps) if fps else 1.0
    kept: deque = deque(maxlen=count)
    taken = 0
    for number, picture in enumerate(video.pictures(path)):
      while int(taken * pace + 1e-6) == number and (end or count is None or taken < count):
        kept.append(picture)
        taken += 1
      if taken == count and not end:
        break
    frames = np.stack([video.rgb(picture) for picture in kept])
  except video.Unreadable as error:
    raise BadInput(f"{path} cannot be read as a film: {error}; give an mp4 that plays.") from error
  if count is not None and len(frames) < count:
    rate = f" at {fps:g} frames a second" if fps else ""
    raise BadInput(f"film {path} has {len(frames)} frames{rate}, {count} are wanted: give a longer film.")
  return frames


def read_first(path: str | Path) -> Picture:
  """A still, or the first frame of a film. Raises BadInput."""
  return read_film(path, count=1)[0] if Path(path).suffix.lower() in FILMS else read_image(path)


def read_mask(path: str | Path, fps: float | None = None, count: int | None = None) -> Bool[np.ndarray, "F H W"]:
  """A region mask from a still (F = 1) or a film: white is given and kept, black (or transparent) is generated.

  fps, count: of a film, as of `read_film`. Raises BadInput for a file that cannot be read and for a mask that hides
  nothing.
  """
  path = Path(path)
  frames = read_film(path, fps, count) if path.suffix.lower() in FILMS else np.asarray(_still(path, "black"))[None]
  mask = frames.mean(-1) >= 128
  if mask.all():
    raise BadInput(f"region mask {path} hides no pixel, it is all white: paint black what is to be generated.")
  return mask


def _scale(picture: Picture, height: int, width: int) -> Fitted:
  shrinks = picture.shape[0] >= height and picture.shape[1] >= width
  return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _crop(picture: Picture, height: int, width: int) -> Fitted:
  return video.fit(picture, video.Size(height, width))


def _pad(picture: Picture, height: int, width: int) -> Fitted:
  scale = min(height / picture.shape[0], width / picture.shape[1])
  inner = _scale(picture, max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
  top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
  out = np.zeros((height, width, 3), np.uint8)
  out[top:top + inner.shape[0], left:left + inner.shape[1]] = inner
  return out


FITS = {  # --fit: what to do with a picture of another aspect
  "crop": _crop,      # cover the film, cut evenly on both sides
  "pad": _pad,        # lie inside the film, black bars
  "stretch": _scale,  # bend to the film's shape
}


def alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
  """Whether two sizes (height, width) are of one aspect, or so near that nobody sees it."""
  off = (one[1] * other[0]) / (one[0] * other[1])
  return 1 / (1 + TOLERANCE) <= off <= 1 + TOLERANCE


def fit(film: Film, height: int, width: int, how: str | None = None,
        name: str = "the image") -> UInt8[np.ndarray, "F h w 3"]:
  """Brings frames to the size of the film to make.

  how: in FITS; without it an aspect that differs by more than 2 % is refused with BadInput. name: for that message.
  """
  tall, wide = film.shape[1:3]
  if how is None and not alike((tall, wide), (height, width)):
    raise BadInput(f"{name} is {wide} x {tall} (aspect {wide / tall:.3f}), the film {width} x {height} "
                   f"({width / height:.3f}), allowed is 2 % of difference: add --fit crop, --fit pad or --fit stretch.")
  way = _scale if how is None else pick(FITS, how, "fit")
  return np.stack([way(frame, height, width) for frame in film])


def fit_mask(mask: Bool[np.ndarray, "F H W"], height: int, width: int, how: str | None = None,
             name: str = "the region mask") -> Bool[np.ndarray, "F h w"]:
  """`fit` for a mask. Bars count as given; a pixel is hidden where more than half of what falls on it is."""
  hidden = np.repeat(~mask[..., None], 3, -1).astype(np.uint8) * 255
  return fit(hidden, height, width, how, name)[..., 0] < 128
