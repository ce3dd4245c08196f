"""Whether two small pictures show one scene: how much of one can be had by moving the pixels of the other."""

import cv2
import numpy as np
from jaxtyping import UInt8

OTHER = .54     # share of unexplained pixels above which two pictures are of different scenes
TOLERANCE = 24  # grey levels that a moved pixel may be off, at most ...
CONTRAST = .6   # ... and in standard deviations of its picture
PLAIN = .15     # weight of a pixel without detail about it, which moving explains too easily, to one with
_AROUND = np.ones((5, 5), np.uint8)


def moved(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """The source with its pixels moved to where they are seen in the target.

  By optical flow (DIS), alone or after the one shift of the whole that phase correlation finds: flow loses fast pans.
  """
  grey, aim = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (source, target))
  window = cv2.createHanningWindow(grey.shape[::-1], cv2.CV_32F)
  (right, down), _ = cv2.phaseCorrelate(grey.astype(np.float32), aim.astype(np.float32), window)
  made = [_flowed(source, grey, aim)]
  if max(abs(right), abs(down)) > 1:
    whole = np.float32([[1, 0, right], [0, 1, down]])
    shifted = cv2.warpAffine(source, whole, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    made.append(_flowed(shifted, cv2.cvtColor(shifted, cv2.COLOR_RGB2GRAY), aim))
  return min(made, key=lambda picture: cv2.norm(picture, target, cv2.NORM_L1))


def _flowed(source: np.ndarray, grey: np.ndarray, aim: np.ndarray) -> np.ndarray:
  # Made anew: a very small picture would leave its scales to all later ones.
  flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(aim, grey, None)
  rows, columns = np.indices(grey.shape, dtype=np.float32)
  return cv2.remap(source, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR,
                   borderMode=cv2.BORDER_REPLICATE)


def lit(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """The source with each colour as bright on average as the target's, up to a factor of three."""
  gain = (target.mean((0, 1)) + 1) / (source.mean((0, 1)) + 1)
  return np.clip(source * np.clip(gain, 1 / 3, 3), 0, 255).astype(np.uint8)


def unexplained(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> float:
  """Share of the target's detail that the source does not have, moved and all in another light as it may be.

  The brighter picture is darkened, down to a half, and never the darker one lit: white would be made of anything.
  """
  gain = float(np.clip((target.mean() + 1) / (source.mean() + 1), .5, 2.))
  darker = [(each * min(1., by)).astype(np.uint8) for each, by in ((source, gain), (target, 1 / gain))]
  # Dark and misty pictures differ by less.
  allowed = float(np.clip(CONTRAST * target.std(), TOLERANCE / 2, TOLERANCE))
  shares = []
  for a, b, tolerance in ((source, target, allowed), (*darker, allowed * min(gain, 1 / gain))):
    detail = cv2.morphologyEx(cv2.cvtColor(b, cv2.COLOR_RGB2GRAY), cv2.MORPH_GRADIENT, _AROUND)
    weight = np.minimum(detail.astype(np.float32) / TOLERANCE, 1) + PLAIN
    shares.append(float(weight[cv2.absdiff(moved(a, b), b).max(-1) > tolerance].sum() / weight.sum()))
  return min(shares)


def palette(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
  """Share of colours that two pictures have in common, wherever they are: 0 none .. 1 all."""
  counts = [cv2.calcHist([picture], [0, 1, 2], None, [5] * 3, [0, 256] * 3) / (picture.size / 3) for picture in (a, b)]
  return float(np.minimum(*counts).sum())
