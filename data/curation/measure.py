"""What is known of a shot: how it moves, what it looks like, what text it shows, and what the user's models say of it.

One pass over the shot's frames. Motion is taken from runs of neighbouring frames, one run in two seconds; looks from
three frames; text from one frame in `text_seconds`. Frames are let go as they pass, so memory does not grow with the
shot. A measure that nobody took is absent.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from anisora_jax.errors import BadInput, nearest, pick
from curation import frames, motion, picture, provider, text
from curation.items import Film, Shot

MOTION = ("motion", "motion_per_second", "anisora_dis", "vbench_dis", "camera", "camera_speed")
LOOKS = ("sharpness", "flatness", "palette", "brightness", "contrast", "saturation")
LOOK_FRAMES = 3
RUN_SECONDS, FEWEST_RUNS, MOST_RUNS = 2., 3, 10
_WORDS, _WORD = 200, 100  # words in a list, letters in a word, at most


@dataclass(frozen=True)
class Command:
  """A user's model as a command (PROVIDERS: "command").

  It reads {"id", "film", "fps", "start", "stop", "frames": [{"path", "frame"}, ...]} and prints what it finds, such as
  {"aesthetic": 5.1, "tags": ["rain", "night"]}; what it leaves out, or gives as null, stays absent.
  command: its words; no shell reads them. scores: name -> (lowest, highest) of the numbers it may give. words: names of
  the lists of words. frames: how many it is shown, as PNG. seconds: for one shot.
  """
  name: str
  command: tuple[str, ...]
  scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
  words: tuple[str, ...] = ()
  frames: int = 3
  seconds: float = 60.

  def __post_init__(self):
    where = f"provider {self.name!r}"
    if isinstance(self.command, str) or not self.command or not all(isinstance(word, str) for word in self.command):
      raise BadInput(f"{where} has command {self.command!r}: give a list of words, as ['python', 'score.py'].")
    if not self.scores and not self.words:
      raise BadInput(f"{where} gives nothing: name its scores, as {{'aesthetic': (0, 10)}}, or its lists of words.")
    for score, bounds in self.scores.items():
      if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise BadInput(f"{where} has bounds {tuple(bounds)} for {score!r}: give the lowest and the highest score.")
    for given in self.gives():
      if given in (*MOTION, *LOOKS, "text_area"):
        raise BadInput(f"{where} gives {given!r}, which is measured here: take another name.")
    for number, low, high in (("frames", 1, 64), ("seconds", .1, 86400)):
      if not low <= getattr(self, number) <= high:
        raise BadInput(f"{where} has {number} {getattr(self, number)}: allowed are {low} to {high}.")
    object.__setattr__(self, "command", tuple(self.command))
    object.__setattr__(self, "words", tuple(self.words))
    object.__setattr__(self, "scores", {name: tuple(bounds) for name, bounds in self.scores.items()})

  def gives(self) -> tuple[str, ...]:
    return (*self.scores, *self.words)

  def ask(self, film: Film, shot: Shot, shown: dict[int, UInt8[np.ndarray, "h w 3"]]) -> dict[str, Any]:
    """The scores and words of a shot. shown: its frames by number. Raises provider.Failed."""
    with tempfile.TemporaryDirectory() as folder:
      paths = []
      for number, pixels in shown.items():
        paths.append({"path": str(Path(folder) / f"{number:08}.png"), "frame": number})
        cv2.imwrite(paths[-1]["path"], pixels[..., ::-1])
      reply = provider.ask(self.name, self.command, {
        "id": shot.id, "film": film.name, "fps": film.fps, "start": shot.start, "stop": shot.stop, "frames": paths},
        self.seconds)
    return {name: self._checked(name, value, shot) for name, value in reply.items() if value is not None}

  def _checked(self, name: str, value: Any, shot: Shot) -> Any:
    def refused(why: str) -> provider.Failed:
      return provider.Failed(f"provider {self.name!r} gives {name[:40]!r} as {value!r:.80} for {shot.id!r}: {why}")
    if name in self.scores:
      low, high = self.scores[name]
      if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refused(f"allowed are numbers from {low:g} to {high:g}.")
      return float(value)
    if name in self.words:
      if not (isinstance(value, list) and len(value) <= _WORDS and all(
          isinstance(word, str) and word.strip() and word.isprintable() and len(word) <= _WORD for word in value)):
        raise refused(f"allowed is a list of at most {_WORDS} words of at most {_WORD} letters.")
      return value
    raise refused(f"it did not say that it would; {nearest(name, self.gives())}")


PROVIDERS = {"command": Command}  # "kind" in configs -> what is made of the other fields


@dataclass(frozen=True)
class Settings:
  """height: rows of the picture inside the borders at which text and looks are taken. still: widths a second below
  which the camera stands. text_detector: in text.DETECTORS, or "none". text_seconds: between looks for text.
  providers: the user's models, as in PROVIDERS, or mappings of their fields."""
  height: int = 480
  still: float = .02
  text_detector: str = "ppocr"
  text_seconds: float = 3.
  providers: tuple[Command | Mapping[str, Any], ...] = ()

  def __post_init__(self):
    for name, low, high in (("height", 32, 4320), ("still", 0, 10), ("text_seconds", .1, 3600)):
      if not low <= getattr(self, name) <= high:
        raise BadInput(f"measure.{name} is {getattr(self, name)}: allowed are {low} to {high}.")
    pick({**text.DETECTORS, "none": None}, self.text_detector, "text detector")
    object.__setattr__(self, "providers", tuple(_provider(given) for given in self.providers))
    taken = [name for given in self.providers for name in given.gives()]
    if len(set(taken)) < len(taken):
      raise BadInput(f"more than one provider gives {max(taken, key=taken.count)!r}: name them apart.")

  def names(self) -> tuple[str, ...]:
    """All measures that a shot can have."""
    return (*MOTION, *LOOKS, *(("text_area",) if self.text_detector != "none" else ()),
            *(name for given in self.providers for name in given.gives()))


def _provider(given: Command | Mapping[str, Any]) -> Command:
  if isinstance(given, Command):
    return given
  fields = dict(given)
  kind = pick(PROVIDERS, fields.pop("kind", "command"), "kind of provider")
  for name in fields:
    if name not in kind.__dataclass_fields__:
      raise BadInput(f"a provider has no field {name!r}: {nearest(name, kind.__dataclass_fields__)}")
  for name in ("name", "command"):
    if name not in fields:
      raise BadInput(f"a provider lacks its {name!r}: got {fields!r}.")
  return kind(**fields)


def _spread(shot: Shot, count: int) -> list[int]:
  """Numbers of at most `count` frames: the middles of as many equal parts of a shot."""
  length = shot.stop - shot.start
  return sorted({shot.start + int((k + .5) * length / count) for k in range(count)})


def _part(first: int, size: int, scale: float, most: int) -> slice:
  start = min(round(first * scale), most - 1)
  return slice(start, max(start + 1, round((first + size) * scale)))


def _inside(pixels: UInt8[np.ndarray, "H W 3"], film: Film, shot: Shot) -> UInt8[np.ndarray, "h w 3"]:
  """A frame of any size without its borders, one pixel at least."""
  top, left, height, width = shot.box
  rows = _part(top, height, pixels.shape[0] / film.height, pixels.shape[0])
  columns = _part(left, width, pixels.shape[1] / film.width, pixels.shape[1])
  return np.ascontiguousarray(pixels[rows, columns])


class _Moves:
  """Takes the motion of a shot while its frames pass; holds only the frames that a pair still waits for."""

  def __init__(self, film: Film, shot: Shot):
    length, seconds = shot.stop - shot.start, (shot.stop - shot.start) / film.fps
    self.fps, self.apart = film.fps, max(1, round(film.fps / 8))  # frames 1/8 s apart, as VBench looks at them
    runs = motion.runs(length, min(MOST_RUNS, max(FEWEST_RUNS, round(seconds / RUN_SECONDS))))
    self.near = {shot.start + k + 1: shot.start + k for run in runs for k in run[:-1]}
    self.far = {shot.start + k + self.apart: shot.start + k for run in runs for k in run[:-1:motion.RUN // 2]
                if k + self.apart < length}
    self.wanted = {*self.near, *self.near.values(), *self.far, *self.far.values()}
    self.held: dict[int, motion.Grey] = {}
    self.lengths, self.largest, self.top, self.steps = [], [], [], []

  def add(self, number: int, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    fine = motion.small(pixels, motion.FINE_WIDTH)
    self.held = {k: grey for k, grey in self.held.items() if k >= number - max(1, self.apart)} | {number: fine}
    if number in self.near:
      moved = motion.flow(*(motion.narrow(grey) for grey in (self.held[self.near[number]], fine)))
      self.lengths.append(motion.length(moved))
      self.largest.append(motion.largest(moved))
    if number in self.far:
      before = self.held[self.far[number]]
      self.top.append(motion.top_lengths(motion.flow(before, fine)))
      self.steps.append(motion.camera_step(before, fine))

  def measures(self, still: float) -> dict[str, Any]:
    if not self.lengths:
      return {}
    mean = float(np.mean(self.lengths))
    found = {"motion": mean, "motion_per_second": mean * self.fps, "anisora_dis": float(np.mean(self.largest))}
    if self.top:
      seconds = self.apart / self.fps
      found |= {"vbench_dis": float(np.mean(self.top)), "camera": motion.camera(self.steps, seconds, still),
                "camera_speed": motion.camera_speed(self.steps, seconds)}
    return found


def measure(film: Film, shot: Shot, settings: Settings) -> dict[str, Any]:
  """The measures of a shot by name, numbers rounded to 5 places. Raises video.Unreadable and provider.Failed."""
  moves, looks, shares = _Moves(film, shot), [], []
  detect = None if settings.text_detector == "none" else text.detector(settings.text_detector)
  look_at = _spread(shot, LOOK_FRAMES)
  seconds = (shot.stop - shot.start) / film.fps
  text_at = _spread(shot, max(1, round(seconds / settings.text_seconds))) if detect else []
  show = {given.name: _spread(shot, given.frames) for given in settings.providers}
  large_at = {*look_at, *text_at, *(number for numbers in show.values() for number in numbers)}
  shown = {}
  rows = {"large": _rows(film, settings.height * film.height / shot.box[2]),
          "small": _rows(film, motion.FINE_WIDTH * film.height / shot.box[3])}
  for number, decoded in frames.pictures(film, shot.start, max(moves.wanted | large_at) + 1):
    if number in moves.wanted:
      moves.add(number, _inside(frames.shown(decoded, film, rows["small"]), film, shot))
    if number in large_at:
      pixels = _inside(frames.shown(decoded, film, rows["large"]), film, shot)
      looks += [picture.look(pixels)] if number in look_at else []
      shares += [text.area(detect(pixels), *pixels.shape[:2])] if number in text_at else []
      shown |= {number: pixels} if any(number in numbers for numbers in show.values()) else {}
  found = moves.measures(settings.still)
  found |= {name: float(np.mean([look[name] for look in looks])) for name in LOOKS}
  found |= {"text_area": float(np.mean(shares))} if shares else {}
  for given in settings.providers:
    found |= given.ask(film, shot, {number: shown[number] for number in show[given.name]})
  return {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}


def _rows(film: Film, wanted: float) -> int:
  """Rows, even, at which a film is read: as wanted, and never more than it has."""
  return max(2, min(film.height, round(wanted)) // 2 * 2)
