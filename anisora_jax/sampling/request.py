"""What a user gives of a film to make: stills, a clip, a region -> one canvas of pixels and a mask of what is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from einops import reduce
from jaxtyping import Bool, UInt8

from anisora_jax.errors import BadInput
from anisora_jax.sampling import given


@dataclass(frozen=True)
class Request:
  """One film to make. frames, height, width: its size, fps: its pace.

  first, last, keyframes (frame number -> file): stills. loop: the first still is also the last frame, which the film
  then leaves out. clip: a film whose first `keep` frames are given (continuation), or, with a region, all its pixels
  outside. region: white is given, black is made, from the second frame on, as AniSora has it; without a clip the first
  still lies under it in every frame; a film of masks has the pace of a clip. fit: how a picture of another aspect is
  brought to size, in given.FITS; "" refuses it. like: (height, width) of the picture from which the film has its size,
  whole cells of about its shape: `fit` is then of that shape alone. listed: frame of the still that an image encoder
  sees, by default the first in time.
  """

  frames: int
  height: int
  width: int
  fps: float
  first: str = ""
  last: str = ""
  keyframes: Mapping[int, str] = field(default_factory=dict)
  clip: str = ""
  keep: int = 0
  region: str = ""
  loop: bool = False
  fit: str = ""
  like: tuple[int, int] | None = None
  listed: int | None = None

  def __post_init__(self):
    for frame in self.keyframes:
      if not 0 <= frame < self.frames:
        raise BadInput(f"keyframe {frame} is outside the film of {self.frames} frames: take 0 .. {self.frames - 1}.")
    if self.loop and (not self.first or self.last):
      raise BadInput("a loop needs --first and no --last: its last frame is the first still.")
    if self.keep and not 0 < self.keep < self.frames:
      raise BadInput(f"--keep {self.keep} of a film of {self.frames} frames: take 1 .. {self.frames - 1}.")
    if self.keep and not self.clip:
      raise BadInput(f"--keep {self.keep} is of the frames of a clip: add --clip film.mp4.")
    ends = {0: self.first, self.frames - 1: self.first if self.loop else self.last}
    for frame, path in ends.items():
      if path and frame in self.keyframes:
        raise BadInput(f"two pictures are given for frame {frame}, {path} and {self.keyframes[frame]}: leave out one.")
    if self.clip and not (self.keep or self.region):
      raise BadInput("--clip needs --keep N to go on from its first N frames, or --region to redraw a part of it.")
    if self.region and not (self.clip or self.first):
      raise BadInput("--region needs --clip film.mp4, or --first still.png, for the pixels around it.")


def parse_keyframes(words: list[str]) -> dict[int, str]:
  """["12=a.png"] -> {12: "a.png"}."""
  frames = {}
  for word in words:
    number, equals, path = word.partition("=")
    if not equals or not number.strip().isdecimal() or not path:
      raise BadInput(f"keyframe {word!r} is not of the form FRAME=IMAGE, for example 12=pose.png.")
    other = frames.setdefault(int(number), path)
    if other != path:
      raise BadInput(f"two pictures are given for frame {int(number)}, {other} and {path}: leave out one.")
  return frames


def _fitted(request: Request, frames: np.ndarray, path: str) -> np.ndarray:
  """Frames, or a mask of them, in the film's size."""
  meant = request.like is None or given.alike(frames.shape[1:3], request.like)
  fit = given.fit_mask if frames.dtype == bool else given.fit
  return fit(frames, request.height, request.width, (meant and request.fit) or None, path)


def _still(request: Request, path: str) -> UInt8[np.ndarray, "1 H W 3"]:
  """A still in the film's size; of an mp4 its first frame."""
  return _fitted(request, given.read_first(path)[None], path)


def lay_out(request: Request, cell: int) -> tuple[UInt8[np.ndarray, "F H W 3"], Bool[np.ndarray, "F h w"]]:
  """The canvas and its mask, True = given, in cells of `cell` pixels a side; a cell is given if all its pixels are.

  Raises BadInput for files that cannot be used, and for a region that hides no cell.
  """
  size = (request.height, request.width)
  canvas = np.full((request.frames, *size, 3), 127, np.uint8)
  mask = np.zeros((request.frames, *size), bool)
  if request.clip:
    clip = given.read_film(request.clip, request.fps, request.frames if request.region else request.keep)
    canvas[:len(clip)] = _fitted(request, clip, request.clip)
    mask[:request.keep or 1] = True
  if request.region:
    region = given.read_mask(request.region, request.fps, request.frames)
    region = _fitted(request, region, request.region)
    if not request.clip:
      canvas[:] = _still(request, request.first)
    mask |= region
  stills = {0: request.first, request.frames - 1: request.first if request.loop else request.last, **request.keyframes}
  for frame, path in stills.items():
    if path:
      canvas[frame], mask[frame] = _still(request, path)[0], True
  cells = reduce(mask, "F (h p) (w q) -> F h w", "min", p=cell, q=cell)
  if cells.all():
    raise BadInput(f"nothing is left to make: all {request.frames} frames are given in every cell of {cell} pixels; "
                   "give less, or a larger black region.")
  return canvas, cells
