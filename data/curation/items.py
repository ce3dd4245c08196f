"""What passes between the stages: films, shots, candidates, and what was turned away and why.

Frames are counted on a film's constant-rate timeline (`frames.paced`): frame n is shown at n / fps seconds, whatever
the container says. Items are plain values of JSON, so that a stage's result can be stored, compared and read by people.
"""

from dataclasses import dataclass, field
from typing import Any

STAGES = ("probe", "cut", "measure", "keep", "deduplicate", "budget", "describe", "pack")


@dataclass(frozen=True)
class Source:
  """A file that may be a film. key: names its results on disk. name: below the folder of films, posix. state: its size
  and time of change, so that a file that changed is read anew."""
  key: str
  name: str
  path: str
  state: tuple[int, int]


@dataclass(frozen=True)
class Film:
  """One film that can be used, as it is shown: turned upright, square pixels.

  name: path below the folder of films, posix. path: where it lies. sha: sha256 of its bytes. fps: of the constant-rate
  timeline. frames: of that timeline; what the container claims until the film was decoded. repairs: what is mended
  while reading ("variable_rate", "rotated", "hdr", "odd_size", "anamorphic", "truncated").
  """
  name: str
  path: str
  sha: str
  bytes: int
  codec: str
  height: int
  width: int
  fps: float
  frames: int
  repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shot:
  """Frames [start, stop) of a film inside a box (top, left, height, width) without black borders.

  opens: how it begins: start, cut, fade, dissolve, or split (a long shot that was divided).
  """
  film: str
  start: int
  stop: int
  box: tuple[int, int, int, int]
  opens: str = "cut"

  @property
  def id(self) -> str:
    return f"{self.film}/{self.start:06}"


@dataclass(frozen=True)
class Candidate:
  """A shot that was measured. A score that no provider gave is absent, never a number.

  measures: name -> number, word or list of words. prints: perceptual hashes of frames, 64-bit integers.
  """
  shot: Shot
  fps: float
  measures: dict[str, Any]
  prints: tuple[int, ...]
  caption: str = ""
  facts: dict[str, Any] = field(default_factory=dict)  # licence, source, who wrote the caption


@dataclass(frozen=True)
class Rejected:
  """A film or a shot that goes no further. reason: a word of the stage's own table. detail: for people."""
  what: str   # name of a film, or id of a shot
  film: str
  stage: str
  reason: str
  detail: str = ""

  def __post_init__(self):
    if self.stage not in STAGES:
      raise ValueError(f"{self.stage!r} is no stage: {', '.join(STAGES)}.")
