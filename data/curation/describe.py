"""What is seen in a clip, in words: from files beside the film, a user's program, a model that sees pictures, or facts.

Providers are tried in the order of the settings; the first that gives words is taken and named. Where none does, the
clip stays without a caption and says why: nothing is made up. Captions are foreign text: control signs and what makes
HTML are taken out, their length is bounded, and whoever shows them still escapes them.

AniSora's scores follow the caption as `anisora_jax.sampling.prompts.suffix` writes them, from what was measured; a
score that was not measured is not written.
"""

import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pack

from anisora_jax.errors import BadInput, pick
from anisora_jax.loaders import video
from anisora_jax.sampling import prompts
from curation import boxed, chat, provider
from curation.items import Candidate, Film, Shot

SMALL = (18, 32)   # rows, columns of the grey pictures on which change is measured
LOOKS = 4          # of them a second
NOISE = .002       # change that an encoder makes where nothing moves
KEPT_FORMAT = "‌‍"  # joiners without which Persian and emoji are spelled wrong; other format signs turn text about
SUFFIXES = {       # what a caption may end in -> how it looks there, so that no caption says it twice
  "aesthetic": r"aesthetic score: *[-\d.]+", "motion": r"motion score: *[-\d.]+", "camera": r"camera motion: *[^.]*\.?",
  "no_text": r"There is no text in the video\.?"}


class NoCaption(Exception):
  """A provider gave no caption. reason: a word for the funnel. detail: for people. again: it may give one later."""

  def __init__(self, reason: str, detail: str, again: bool = False):
    super().__init__(reason, detail)
    self.reason, self.detail, self.again = reason, detail, again


@dataclass(frozen=True)
class Caption:
  """text: with the scores; "" where no provider gave one. by: the provider. reason, detail: why there is none, or what
  failed before one gave it. again: one of those that failed may do better in another run."""
  text: str
  by: str = ""
  reason: str = ""
  detail: str = ""
  again: bool = False


@dataclass(frozen=True)
class Settings:
  """providers: tried in this order. longest: letters of a caption. suffixes: of SUFFIXES. motion_scale: motion score
  of a mean flow of one width of the picture a second; ours, as AniSora never said its own.
  no_text: share of the picture that text takes at most where the caption may say that there is none.

  command: program and arguments, without a shell. seconds: for one of its answers, or one of the endpoint's.
  pictures: key frames of a clip at most; side: pixels of their longer side; change: mean change of grey, 0 .. 1, that
  is worth a key frame. url, model, key_variable, tries, pause, tokens: of the endpoint, see chat.Endpoint.
  """
  providers: tuple[str, ...] = ("sidecar", "template")
  longest: int = 2000
  suffixes: tuple[str, ...] = tuple(SUFFIXES)
  motion_scale: float = 10.
  no_text: float = 0.
  command: tuple[str, ...] = ()
  seconds: float = 120.
  pictures: int = 8
  side: int = 512
  change: float = .05
  url: str = chat.Endpoint.url
  model: str = ""
  key_variable: str = ""
  tries: int = 3
  pause: float = 1.
  tokens: int = 400

  def __post_init__(self):
    for name in ("providers", "suffixes", "command"):
      if isinstance(getattr(self, name), str):
        raise BadInput(f"describe.{name} is one text, {getattr(self, name)!r}: give a tuple, as ('sidecar',).")
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in self.providers:
      pick(PROVIDERS, name, "provider of captions")
    for name in self.suffixes:
      pick(SUFFIXES, name, "ending of captions")
    if "command" in self.providers and not self.command:
      raise BadInput("describe.providers has 'command', and describe.command is empty: give program and arguments.")
    if "endpoint" in self.providers and not self.model:
      raise BadInput("describe.providers has 'endpoint', and describe.model is empty: name it as its server does.")
    ranges = {"longest": (16, 10**5), "motion_scale": (1e-3, 1e6), "no_text": (0, 1), "seconds": (.01, 86400),
              "pictures": (1, 64), "side": (32, 4096), "change": (1e-4, 1)}
    for name, (low, high) in ranges.items():
      if not low <= getattr(self, name) <= high:
        raise BadInput(f"describe.{name} is {getattr(self, name)}: allowed are {low:g} to {high:g}.")
    self.endpoint()

  def endpoint(self) -> chat.Endpoint:
    return chat.Endpoint(self.url, self.model, self.key_variable, self.seconds, self.tries, self.pause, self.tokens)


def clean(text: str, longest: int) -> str:
  """A caption as one line of plain text without control signs, < and >, cut between words at `longest` letters."""
  text = text.encode("utf-8", "ignore").decode()  # without halves of surrogate pairs, which JSON may bring
  kept = (" " if unicodedata.category(sign) in ("Cc", "Zl", "Zp") or sign in "<>" else
          "" if unicodedata.category(sign) in ("Cf", "Co") and sign not in KEPT_FORMAT else sign for sign in text)
  line = " ".join(unicodedata.normalize("NFC", "".join(kept)).split())
  if len(line) <= longest:
    return line
  return line[:longest].rsplit(" ", 1)[0] if " " in line[:longest] else line[:longest]


def scores(candidate: Candidate, settings: Settings) -> tuple[dict[str, str], str]:
  """(name of SUFFIXES -> its text, of what was measured; why one that was measured is left out)."""
  measures = candidate.measures
  given = {"aesthetic": _number(measures.get("aesthetic")), "camera": measures.get("camera"),
           "motion": _number(measures.get("motion_per_second"))}
  if given["motion"] is not None:
    given["motion"] *= settings.motion_scale
  if given["camera"] == "other" or not isinstance(given["camera"], str):
    given["camera"] = None
  text_area = _number(measures.get("text_area"))
  given["no_text"] = True if text_area is not None and text_area <= settings.no_text else None
  written, missing = {}, []
  for name in settings.suffixes:
    if given[name] is not None:
      try:
        written[name] = prompts.suffix(**{name: given[name]})
      except BadInput as mistake:
        missing.append(str(mistake))
  return written, "; ".join(missing)


def _number(value: Any) -> float | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
  return float(value) if is_number else None


def describe(film: Film, candidate: Candidate, settings: Settings) -> Caption:
  """The caption of a shot with its scores. Raises BadInput where the settings cannot work for any clip."""
  written, missing = scores(candidate, settings)
  failed, again = [], False
  for name in settings.providers:
    try:
      text = PROVIDERS[name](film, candidate, settings)
      for score in written:
        text = re.sub(SUFFIXES[score], " ", text, flags=re.IGNORECASE)
      text = clean(text, settings.longest)
      if not text:
        raise NoCaption("empty", "no word in it")
    except NoCaption as failure:
      failed.append((f"{name}_{failure.reason}", failure.detail))
      again |= failure.again
      continue
    return Caption(" ".join([text, *written.values()]), name, detail=_told(failed, missing), again=again)
  return Caption("", reason=failed[-1][0] if failed else "no_provider", detail=_told(failed, missing), again=again)


def _told(failed: list[tuple[str, str]], missing: str) -> str:
  return clean("; ".join([*(f"{reason}: {detail}" for reason, detail in failed), *filter(None, [missing])]), 500)


def sidecar(film: Film, candidate: Candidate, _: Settings) -> str:
  """What NAME.json or NAME.txt beside the film says of the middle of the shot, or of the film. See data/pack.py."""
  try:
    caption, _known, shots = pack.read_words(Path(film.path))
  except video.Unreadable as error:
    raise NoCaption("damaged", str(error)) from None
  text = pack.Beside(caption, "", "", shots, None).caption_of(range(candidate.shot.start, candidate.shot.stop))
  if not text.strip():
    raise NoCaption("absent", "no caption beside the film")
  return text


def template(_: Film, candidate: Candidate, __: Settings) -> str:
  """A sentence of what was measured: tags, length, what the camera does."""
  measures = candidate.measures
  tags = [word for word in measures.get("tags", []) if isinstance(word, str)]
  verb, _space, way = str(measures.get("camera", "other")).partition(" ")
  camera = {"static": "stands still", "other": "", "pan": f"pans {way}", "tilt": f"tilts {way}", "zoom": f"zooms {way}",
            "roll": "rolls"}.get(verb, "")
  shot = candidate.shot
  parts = [", ".join(tags), f"a shot of {(shot.stop - shot.start) / candidate.fps:.1f} seconds",
           camera and f"the camera {camera}"]
  text = ", ".join(filter(None, parts))
  return text[0].upper() + text[1:] + "."


def key_frames(changes: np.ndarray, most: int, worth: float) -> list[int]:
  """Which of some frames to show: the first, the last, and between them where equal shares of all change have passed.

  changes: mean change of grey, 0 .. 1, from each frame to the next, [frames - 1]. most: frames. worth: change that asks
  for one more. What stands still is shown once.
  """
  passed = np.concatenate([[0.], np.cumsum(np.where(changes < NOISE, 0., changes))])
  count = min(most, len(passed), 1 + round(passed[-1] / worth))
  marks = passed[-1] * np.linspace(0, 1, count)
  return sorted(set(np.minimum(np.searchsorted(passed, marks - 1e-9), len(passed) - 1).tolist()))


def shown(film: Film, shot: Shot, settings: Settings) -> list[tuple[float, bytes]]:
  """(seconds, PNG) of the key frames of a shot; read twice, so that a long one fits in memory. Raises NoCaption."""
  step = max(1, round(film.fps / LOOKS))
  try:
    last, changes = None, []
    for _, picture in boxed.pictures(film, shot, SMALL[0], range(0, shot.stop - shot.start, step)):
      grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), SMALL[::-1], interpolation=cv2.INTER_AREA)
      if last is not None:
        changes.append(cv2.absdiff(grey, last).mean() / 255)
      last = grey
    wanted = {step * number for number in key_frames(np.array(changes), settings.pictures, settings.change)}
    return [(number / film.fps, _png(picture, settings.side))
            for number, picture in boxed.pictures(film, shot, settings.side, wanted)]
  except video.Unreadable as error:
    raise NoCaption("unreadable", str(error)) from None


def _png(picture: np.ndarray, side: int) -> bytes:
  """A picture as PNG, its longer side at most `side`."""
  scale = min(1., side / max(picture.shape[:2]))
  size = [max(1, round(length * scale)) for length in picture.shape[1::-1]]
  small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture
  return cv2.imencode(".png", np.ascontiguousarray(small[..., ::-1]))[1].tobytes()


def endpoint(film: Film, candidate: Candidate, settings: Settings) -> str:
  """A model behind an address, told key frame by key frame; see chat.py."""
  address = settings.endpoint()
  address.key()
  try:
    return chat.tell(shown(film, candidate.shot, settings), lambda text, pictures: chat.ask(address, text, pictures))
  except chat.NoAnswer as failure:
    raise NoCaption(*failure.args) from None


def command(film: Film, candidate: Candidate, settings: Settings) -> str:
  """A program of the user's, asked as provider.py does; it answers {"caption": "..."}.

  It is told {"film", "id", "start", "stop", "fps", "measures", "pictures": [{"path": of a PNG, "seconds": in the shot},
  ...]}.
  """
  if shutil.which(settings.command[0]) is None:
    raise BadInput(f"describe.command begins with {settings.command[0]!r}, which is no program here: give its path.")
  shot = candidate.shot
  with tempfile.TemporaryDirectory(prefix="caption-") as folder:
    told = []
    for number, (seconds, png) in enumerate(shown(film, shot, settings)):
      path = Path(folder) / f"{number:03}.png"
      path.write_bytes(png)
      told.append({"path": str(path), "seconds": round(seconds, 3)})
    try:
      answer = provider.ask("describe.command", settings.command, {
        "film": film.name, "id": shot.id, "start": shot.start, "stop": shot.stop, "fps": candidate.fps,
        "measures": candidate.measures, "pictures": told}, settings.seconds)
    except provider.Failed as failure:
      raise NoCaption("failed", str(failure), True) from None
  if not isinstance(answer.get("caption"), str):
    raise NoCaption("junk", 'its answer has no "caption" that is a text')
  return answer["caption"]


Provider = Callable[[Film, Candidate, Settings], str]  # raises NoCaption
PROVIDERS: Mapping[str, Provider] = {"sidecar": sidecar, "command": command, "endpoint": endpoint, "template": template}
