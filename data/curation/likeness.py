"""Whether two small pictures show one scene: how much of one can be had by moving the pixels of the other."""

import cv2
import numpy as np
from jaxtyping import UInt8

OTHER = .45     # share of unexplained pixels above which two pictures are of different scenes
TOLERANCE = 24  # grey levels that a moved pixel may be off
_FLOW = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def moved(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """The source with its pixels moved to where optical flow (DIS) sees them in the target."""
  grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (target, source)]
  flow = _FLOW.calc(*grey, None)
  rows, columns = np.indices(grey[0].shape, dtype=np.float32)
  return cv2.remap(source, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR,
                   borderMode=cv2.BORDER_REPLICATE)


def lit(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """The source with each colour as bright on average as the target's, up to a factor of three."""
  gain = (target.mean((0, 1)) + 1) / (source.mean((0, 1)) + 1)
  return np.clip(source * np.clip(gain, 1 / 3, 3), 0, 255).astype(np.uint8)


def unexplained(source: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> float:
  """Share of the target's pixels that the source does not have, moved and all in another light as it may be."""
  gain = np.clip((target.mean() + 1) / (source.mean() + 1), .5, 2.)
  return min(float((cv2.absdiff(moved(each, target), target).max(-1) > TOLERANCE).mean())
             for each in (source, np.clip(source * gain, 0, 255).astype(np.uint8)))
