"""How close a made clip is to the true one, and what making nothing would have scored."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

Clips = UInt8[np.ndarray, "b F H W 3"] | Float[np.ndarray, "b F H W 3"]  # 0 .. 255


def psnr(clips: Clips, truth: Clips, where: Bool[np.ndarray, "b F H W"] | None = None) -> Float[np.ndarray, "b"]:
  """Peak signal-to-noise ratio of each clip in dB, over all its pixels or those of `where`; inf where it is equal.

  where: True = compare, for example the pixels that were not given. Raises ValueError if a clip has none.
  """
  square = (clips - truth.astype(np.float64)) ** 2
  where = np.ones(clips.shape[:-1], bool) if where is None else where
  counts = where.sum((1, 2, 3))
  if not counts.all():
    raise ValueError(f"no pixel of clip {int(counts.argmin())} is compared: its mask is empty.")
  error = (square.mean(-1) * where).sum((1, 2, 3)) / counts
  with np.errstate(divide="ignore"):
    return 10 * np.log10(255 ** 2 / error)


def repeat_first(clips: Clips) -> Clips:
  """Every frame the first one: what a model must beat that is given the first frame."""
  return np.broadcast_to(clips[:, :1], clips.shape).copy()


def cross_fade(clips: Clips, given: list[int]) -> Float[np.ndarray, "b F H W 3"]:
  """Each frame mixed linearly from the given frames before and after it; past the outermost ones, that frame repeated.

  given: frame numbers, at least one. What a model must beat that is given first and last, keyframes or a beginning.
  """
  given = sorted(set(given))
  frames = np.arange(clips.shape[1])
  shares = np.stack([np.interp(frames, given, one) for one in np.eye(len(given))], axis=1)  # [F, given]
  return np.einsum("Fk,bkHWc->bFHWc", shares.astype(np.float32), clips[:, given].astype(np.float32))
