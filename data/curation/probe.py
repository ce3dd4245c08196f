"""Film or no film: what a file holds, told from its container, its time stamps and its first few pictures.

Every path ends as a Film or as a Rejected with a word of REASONS; nothing raises, nothing waits. What can be mended
while reading is named in Film.repairs, and `frames` mends it.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from anisora_jax import errors
from anisora_jax.loaders import video
from curation import frames, tone
from curation.items import Film, Rejected

REASONS = {
  "not_opened": "missing, forbidden, or a chain of links that never ends",
  "not_a_file": "a folder, pipe, socket or device",
  "empty": "0 bytes",
  "not_a_film": "no container that is read here, or cut off before its index",
  "no_video": "no moving picture, only sound or a cover",
  "undecodable": "no picture can be decoded",
  "still": "fewer than two pictures",
  "too_small": "the shorter side is below `smallest` pixels",
  "too_large": "the longer side is above `largest` pixels",
  "too_slow": "fewer than `slowest` pictures a second on average",
  "odd_shape": "pixels or pictures more than `narrowest` times as long as wide",
  "slanted": "turned by its display matrix, but not by quarter turns",
}
REPAIRS = ("variable_rate", "capped_rate", "untimed", "rotated", "anamorphic", "odd_size", "hdr", "truncated")
# Rates that films have; a measured rate within 0.1 % of one is that one.
RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60)] + [Fraction(n) for n in (8, 10, 12, 15, 24, 25, 30, 48,
                                                                                     50, 60)]


@dataclass(frozen=True)
class Settings:
  """What a film must be to be read at all.

  smallest, largest: of a picture's shorter and longer side, pixels. slowest, fastest: pictures a second; slower films
  are refused, of faster ones every second, third, ... frame is shown. narrowest: longest allowed ratio of sides.
  """
  smallest: int = 32
  largest: int = 8192
  slowest: float = 4.
  fastest: float = 60.
  narrowest: float = 4.

  def __post_init__(self):
    for name, (low, high) in {"smallest": (2, 4096), "largest": (64, 8192), "slowest": (.1, 24), "fastest": (24, 240),
                              "narrowest": (1.5, 16)}.items():
      if not low <= getattr(self, name) <= high:
        raise errors.BadInput(f"probe.{name} is {getattr(self, name)}: allowed are {low} to {high}.")


def probe(path: Path, name: str, settings: Settings) -> Film | Rejected:
  """Reads one file. name: path below the folder of films, posix."""
  try:
    with frames.opened(path) as stream:
      stamps, whole = _stamps(stream)
    with frames.opened(path) as stream:
      first = list(itertools.islice(frames.decoded(stream), 2))
      return _film(path, name, stream, first, (stamps, whole), settings)
  except frames.Refused as refused:
    return Rejected(name, name, "probe", refused.reason, str(refused))
  except (video.Unreadable, OSError, MemoryError) as error:
    return Rejected(name, name, "probe", "undecodable", str(error))


def _film(path: Path, name: str, stream, first: list, timing: tuple, settings: Settings) -> Film:
  (stamps, whole), picture = timing, first[0]
  fps, count, repairs = pacing(stamps, (stream.guessed_rate, stream.average_rate), settings)
  if len(first) < 2 or count < 2:
    raise frames.Refused("still", "a single picture")
  height, width, turned = _size(picture, stream.sample_aspect_ratio or Fraction(1), settings)
  repairs += turned
  if tone.is_hdr(picture):
    repairs += ("hdr",)
  if not whole or count / fps < _claimed_seconds(stream) - 1:
    repairs += ("truncated",)
  with open(path, "rb") as file:
    sha = hashlib.file_digest(file, "sha256").hexdigest()
  return Film(name, str(path), sha, os.path.getsize(path), stream.codec_context.name, height, width, fps, count,
              tuple(word for word in REPAIRS if word in repairs))


def _claimed_seconds(stream) -> float:
  """How long the container says its pictures last, 0 where it does not say. Matroska says it in a tag of the stream."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "").strip("\0 "))
  return sum(float(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1), strict=True)) if tag else 0.


def _stamps(stream) -> tuple[list[float | None], bool]:
  """Times of all pictures in seconds, in the order stored, from the container alone; and whether it ends as it should.

  Eight bytes a picture are kept: the only thing in curation that grows with a film's length, besides its shots.
  """
  stamps, before, count = [], None, 0
  try:
    for packet in stream.container.demux(stream):
      count += bool(packet.size)
      if not packet.size or packet.is_discard:
        continue
      backward = packet.dts is not None and before is not None and packet.dts < before
      before = packet.dts if packet.dts is not None else before
      stamps.append(None if packet.pts is None or backward else float(packet.pts * stream.time_base))
  except frames.DAMAGE:
    return stamps, False
  return stamps, count >= stream.frames


def pacing(stamps: Sequence[float | None], stated: Sequence[Fraction | None], settings: Settings
           ) -> tuple[float, int, tuple[str, ...]]:
  """Rate and number of frames of the constant timeline, and the repairs it takes.

  stamps: times of the pictures in seconds; None where the container does not say, or its clock ran backward, and then
  pictures are counted instead. stated: rates the container claims. Raises Refused.
  """
  stated = [float(rate) for rate in stated if rate]
  if len(stamps) < 2:
    raise frames.Refused("still" if stamps else "undecodable", f"{len(stamps)} pictures")
  if any(stamp is None for stamp in stamps):
    if not stated:
      raise frames.Refused("undecodable", "neither time stamps nor a frame rate")
    fps, repairs, count = min(stated[-1], settings.fastest), ("untimed",), len(stamps)
    if fps < settings.slowest:
      raise frames.Refused("too_slow", f"{fps:g} pictures a second")
    return fps, count, repairs
  times = np.sort(np.asarray(stamps)) - min(stamps)
  gaps = np.diff(times)
  if times[-1] <= 0:
    raise frames.Refused("still", "all pictures at one time")
  mean = float(gaps.size / times[-1])
  if mean < settings.slowest:
    raise frames.Refused("too_slow", f"{mean:g} pictures a second")
  repairs = ()
  constant = [rate for rate in (_known(mean), *stated) if _fits(times, rate)]
  if constant:
    fps = constant[0]
  else:
    fps, repairs = _known(1 / max(float(np.median(gaps)), 1e-9)), ("variable_rate",)
  if fps > settings.fastest:
    # A whole divisor leaves out every second or third frame evenly.
    fps, repairs = fps / np.ceil(fps / settings.fastest - 1e-9), (*repairs, "capped_rate")
  return float(fps), int(np.ceil(times[-1] * fps - .5)) + 1, repairs


def _known(rate: float) -> float:
  nearest = min(RATES, key=lambda known: abs(float(known) - rate))
  return float(nearest) if abs(float(nearest) / rate - 1) < 1e-3 else rate


def _fits(times: np.ndarray, rate: float) -> bool:
  """Whether every picture falls on a frame of its own at a constant rate."""
  return bool(np.all(np.abs(times * rate - np.arange(len(times))) < .5))


def _size(picture, pixel: Fraction, settings: Settings) -> tuple[int, int, tuple[str, ...]]:
  """Height and width shown, even, of a picture whose pixels are `pixel` times as wide as high; and the repairs."""
  repairs = ()
  height, width = picture.height, picture.width
  if not 1 / settings.narrowest <= pixel <= settings.narrowest:
    raise frames.Refused("odd_shape", f"pixels {float(pixel):g} times as wide as high")
  if pixel != 1:
    width, repairs = round(width * pixel), ("anamorphic",)
  turns, mirrored = frames.turn_of(picture)
  if turns or mirrored:
    repairs += ("rotated",)
  if turns % 2:
    height, width = width, height
  for word, wrong in (("too_small", min(height, width) < settings.smallest),
                      ("too_large", max(height, width) > settings.largest),
                      ("odd_shape", max(height, width) > settings.narrowest * min(height, width))):
    if wrong:
      raise frames.Refused(word, f"{height} rows of {width} pixels")
  if height % 2 or width % 2:
    repairs += ("odd_size",)
  return height // 2 * 2, width // 2 * 2, repairs
