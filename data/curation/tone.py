"""HDR to SDR: what a PQ or HLG picture looks like on a screen of 100 nits.

Light in nits over reference white (203 nits, ITU-R BT.2408), BT.2020 to BT.709 primaries, the curve that FFmpeg and
mpv name Moebius (straight up to `KNEE`, then bent so that `PEAK` arrives at 1) on the largest of the three colours,
which keeps hues, and the power 1/2.4 of BT.1886, as the screen undoes it.
"""

from functools import cache

import av
import cv2
import numpy as np
from jaxtyping import Float, UInt8, UInt16

PQ, HLG = 16, 18  # FFmpeg's numbers of the transfer characteristics (ITU-T H.273)
WHITE = 203.
PEAK = 1000. / WHITE
KNEE = .3
# From: ITU-R BT.2087, linear light.
_TO_709 = np.float32([[1.6605, -.5876, -.0728], [-.1246, 1.1329, -.0083], [-.0182, -.1006, 1.1187]])
_LUMA_2020 = np.float32([.2627, .678, .0593])


def is_hdr(picture: av.VideoFrame) -> bool:
  """Whether the transfer characteristics are those of PQ or HLG."""
  return picture.color_trc in (PQ, HLG)


@cache
def _light(transfer: int) -> Float[np.ndarray, "65536"]:
  """Of a 16-bit code: nits over reference white (PQ, SMPTE ST 2084), or the scene's light 0 .. 1 (HLG, BT.2100)."""
  code = np.linspace(0, 1, 2**16)
  if transfer == PQ:
    root = code ** (32 / 2523)
    nits = 10000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
    return (nits / WHITE).astype(np.float32)
  a, b, c = .17883277, .28466892, .55991073
  return np.where(code <= .5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


def moebius(light: np.ndarray) -> np.ndarray:
  """0 .. PEAK to 0 .. 1, straight below KNEE, with a continuous slope."""
  a = -KNEE**2 * (PEAK - 1) / (KNEE**2 - 2 * KNEE + PEAK)
  b = (KNEE**2 - 2 * KNEE * PEAK + PEAK) / (PEAK - 1)
  bent = (b**2 + 2 * b * KNEE + KNEE**2) / (b - a) * (light + a) / (light + b)
  return np.where(light > KNEE, bent, light)


def to_sdr(codes: UInt16[np.ndarray, "h w 3"], transfer: int) -> UInt8[np.ndarray, "h w 3"]:
  """Codes of BT.2020 colours under `transfer`, 0 .. 65535, to RGB for an SDR screen."""
  light = _light(transfer)[codes]
  if transfer == HLG:  # the system's gamma of a screen of 1000 nits
    light *= np.maximum(light @ _LUMA_2020, 1e-6)[..., None] ** .2 * PEAK
  light = np.maximum(cv2.transform(light, _TO_709), 0)
  largest = np.maximum(light.max(-1, keepdims=True), 1e-6)
  shown = np.clip(light * (moebius(np.minimum(largest, PEAK)) / largest), 0, 1)
  return np.rint(255 * shown ** (1 / 2.4)).astype(np.uint8)
