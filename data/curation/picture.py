"""What one picture looks like: sharp or soft, flat or textured, bright, contrasty, colourful.

Sharpness and flatness are taken at a fixed height of 480, so that a film and its smaller copy get the same numbers as
far as both hold the detail; a film that was enlarged is soft.
"""

import cv2
import numpy as np
from jaxtyping import UInt8

HEIGHT = 480
FLAT = 6           # codes of 255 that a flat neighbourhood may span: what H.264 leaves of a flat colour
PALETTE_AREA = .9

Picture = UInt8[np.ndarray, "h w 3"]


def at_height(picture: Picture, height: int = HEIGHT) -> Picture:
  """The picture at a height, its shape kept."""
  size = max(4, round(picture.shape[1] * height / picture.shape[0])), height
  return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if picture.shape[0] > height else cv2.INTER_LINEAR)


def sharpness(picture: Picture) -> float:
  """1 / sqrt(1 + b^2) for edges of blur b, the Gaussian's sigma in pixels at HEIGHT: 1 for steps; thin lines up to 1.7.

  The root mean square of the Laplacian over that of the gradient, after a blur of 1 pixel that silences the rounding to
  bytes, times sqrt(2). Contrast and the number of edges drop out, every blur lowers it, noise raises it (2 at most). A
  blank picture has 0. The usual variance of the Laplacian counts edges as much as it measures them.
  """
  grey = cv2.cvtColor(at_height(picture), cv2.COLOR_RGB2GRAY)
  soft = cv2.GaussianBlur(grey.astype(np.float32), (7, 7), 1)
  strength = np.hypot(cv2.norm(soft[1:], soft[:-1]), cv2.norm(soft[:, 1:], soft[:, :-1]))
  bend = cv2.norm(cv2.Laplacian(soft, cv2.CV_32F, ksize=1, borderType=cv2.BORDER_REPLICATE))
  return float(np.sqrt(2) * bend / strength) if strength > 1 else 0.


def flatness(picture: Picture) -> float:
  """Share of the picture where no channel changes by more than FLAT within 3 x 3 pixels.

  Cel animation is flat but for its lines; a camera's noise and textures leave little flat.
  """
  at, square = at_height(picture), np.ones((3, 3), np.uint8)
  red, green, blue = cv2.split(cv2.morphologyEx(at, cv2.MORPH_GRADIENT, square))
  return cv2.countNonZero(cv2.compare(cv2.max(cv2.max(red, green), blue), FLAT, cv2.CMP_LE)) / red.size


def palette(picture: Picture) -> int:
  """How many colours, of 16 steps a channel, it takes to cover PALETTE_AREA of the picture. Cels have tens, photographs
  hundreds."""
  small = cv2.resize(picture, (256, 144), interpolation=cv2.INTER_NEAREST).astype(np.int32) >> 4
  counts = np.sort(np.bincount((small @ (256, 16, 1)).ravel()))[::-1]
  return int(np.searchsorted(np.cumsum(counts), PALETTE_AREA * counts.sum()) + 1)


def light(picture: Picture) -> tuple[float, float, float]:
  """(brightness, contrast, saturation): mean and standard deviation of luma (BT.601), and mean chroma.

  Chroma is the largest less the smallest of red, green and blue: HSV's saturation times its value, so that noise in the
  dark is not colourful.
  """
  grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
  mean, deviation = cv2.meanStdDev(grey)
  red, green, blue = cv2.split(picture)
  chroma = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
  return float(mean[0, 0]) / 255, float(deviation[0, 0]) / 255, cv2.mean(chroma)[0] / 255


def look(picture: Picture) -> dict[str, float]:
  """All measures of one picture by name."""
  brightness, contrast, saturation = light(picture)
  return {"sharpness": sharpness(picture), "flatness": flatness(picture), "palette": palette(picture),
          "brightness": brightness, "contrast": contrast, "saturation": saturation}
