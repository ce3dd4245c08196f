"""Rows of a batch out of a source of clips: which frames of a clip, at which pace and size."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video
from anisora_jax.loaders.buckets import Bucket


def spans(clip: Any, bucket: Bucket, fps: float) -> tuple[np.ndarray, int]:
  """(indices of the frames that a bucket takes from frame 0 on, how many frames later they may begin at most).

  A clip that states no rate of its own plays at `fps`. Raises video.TooShort.
  """
  own = clip.fps or fps
  if video.paced_length(clip.frames, own, fps) < bucket.frames:
    raise video.TooShort(f"{clip.id} is too short: {clip.frames} frames at {own:g} fps make fewer than "
                         f"{bucket.frames} at {fps:g} fps")
  span = video.pace(own, fps, bucket.frames)
  return span, clip.frames - 1 - int(span[-1])


def all_short(source: Any, bucket: Bucket, fps: float) -> bool:
  """Whether the clips of a source are of one length, which is too short for a bucket."""
  return source.seconds is not None and round(source.seconds * fps) < bucket.frames


def refuse_short(sources: Sequence[Any], bucket: Bucket, fps: float) -> None:
  """Raises BadInput where no source has clips that may be long enough for a bucket."""
  if all(all_short(source, bucket, fps) for source in sources):
    longest = max(sources, key=lambda source: source.seconds)
    raise BadInput(f"bucket {bucket} asks for {bucket.frames} frames, but clips of {longest.name} last "
                   f"{longest.seconds:g} s, {round(longest.seconds * fps)} frames at {fps:g} fps; take fewer frames, "
                   f"more fps, or pack with --clip_seconds {math.ceil(bucket.frames / fps * 10) / 10:g} or more.")


class Clips:
  """The clips of `source` as one bucket wants them."""

  def __init__(self, source: Any, bucket: Bucket, fps: float):
    self.name, self.source, self._bucket, self._fps = source.name, source, bucket, fps

  def __len__(self) -> int:
    return len(self.source)

  def row(self, number: int, draw: np.random.Generator | None) -> dict[str, Any]:
    """Frames, character and caption of one clip. draw: of its first frame; None takes its first.

    Raises video.Unreadable.
    """
    clip = self.source[number]
    span, spare = spans(clip, self._bucket, self._fps)
    first = 0 if draw is None else int(draw.integers(spare + 1))
    frames, character = clip.look(first + span, video.Size(self._bucket.height, self._bucket.width))
    return {"frames": frames, "character": character, "caption": clip.caption}
