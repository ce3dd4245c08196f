"""Films with planted truth for the tests of curation: scenes, the ways from one to the next, and what only looks so.

A scene is a function from seconds to a picture, uint8 [H, W, 3]. A film is a list of frames with the truth beside it:
(kind, start, stop) of each transition, frames [start, stop) belong to neither scene alone; a hard cut is (cut, n, n).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import toons

from anisora_jax.loaders import video

HEIGHT, WIDTH = 96, 144
Scene = Callable[[float], np.ndarray]


def toon(seed: int, seconds: float = 4) -> Scene:
  """Drawn characters before a panning background."""
  rng = np.random.default_rng(seed)
  place = str(rng.choice(list(toons.cartoon.PLACES)))
  shot = toons.plan_shot(rng, place, seconds, 100 * WIDTH / HEIGHT)
  return lambda u: toons.draw_frame(shot, u, HEIGHT, WIDTH)[0]


def clouds(seed: int, speed: float, zoom: float = 0., bright: float = 1.) -> Scene:
  """A large painted texture under a moving camera. speed: widths of the picture a second. zoom: growth a second."""
  rng = np.random.default_rng(seed)
  canvas = np.zeros((320, 640, 3))
  for octave in range(2, 8):
    coarse = rng.normal(size=(2**octave, 2**(octave + 1), 3)) * rng.uniform(.3, 1, 3)
    around = np.pad(coarse, ((2, 2), (2, 2), (0, 0)), "wrap")  # so that the painting has no seam
    edge = 640 // 2**octave
    large = cv2.resize(around, (640 + 2 * edge, 320 + 2 * edge), interpolation=cv2.INTER_CUBIC)
    canvas += large[edge:-edge, edge:-edge] * 1.4**-octave
  canvas = canvas / canvas.std() * 45 + rng.uniform(60, 190, 3)
  canvas = np.clip(canvas * bright, 0, 255).astype(np.uint8)
  angle, x0, y0 = rng.uniform(0, 2 * np.pi), rng.uniform(0, 600), rng.uniform(0, 300)

  def at(u: float) -> np.ndarray:
    scale = 1 / (1 + zoom * u)
    x = x0 + np.cos(angle) * speed * WIDTH * u
    y = y0 + np.sin(angle) * speed * WIDTH * u
    return cv2.warpAffine(canvas, np.float32([[scale, 0, x], [0, scale, y]]), (WIDTH, HEIGHT),
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP)
  return at


def blocks(seed: int, speed: float = .5) -> Scene:
  """Flat rectangles that wander over a flat ground, large ones near the camera among them."""
  rng = np.random.default_rng(seed)
  ground = rng.integers(20, 236, 3)
  things = [(rng.integers(0, 256, 3), rng.uniform(.1, .45, 2), rng.uniform(0, 1, 2), rng.uniform(-speed, speed, 2))
            for _ in range(6)]

  def at(u: float) -> np.ndarray:
    picture = np.full((HEIGHT, WIDTH, 3), ground, np.uint8)
    for colour, size, place, velocity in things:
      top, left = ((place + velocity * u) % 1.4 - .3) * (HEIGHT, WIDTH)
      bottom, right = (top, left) + size * (HEIGHT, WIDTH)
      picture[max(0, int(top)):max(0, int(bottom)), max(0, int(left)):max(0, int(right))] = colour
    return picture
  return at


def on(scene: Scene, hold: int, fps: float) -> Scene:
  """A scene drawn on twos, threes, ...: every drawing is held for `hold` frames."""
  return lambda u: scene(np.floor(u * fps / hold + 1e-6) * hold / fps)


@dataclass
class Reel:
  """A film being put together."""
  fps: float = 24.
  frames: list = field(default_factory=list)
  truth: list = field(default_factory=list)

  def play(self, scene: Scene, seconds: float, start: float = 0.) -> "Reel":
    """Adds a scene, which begins `start` seconds into itself."""
    self.frames += [scene(start + n / self.fps) for n in range(round(seconds * self.fps))]
    return self

  def cut(self) -> "Reel":
    self.truth.append(("cut", len(self.frames), len(self.frames)))
    return self

  def fade(self, scene: Scene, end: float, begin: Scene, seconds: float, hold: float = 0., to: int = 0) -> "Reel":
    """Out of a scene from its second `end` on, `hold` seconds of one shade `to`, and into another from its start."""
    count, first = round(seconds * self.fps), len(self.frames)
    for n in range(count):
      self.frames.append(_mix(scene(end + n / self.fps), to, (n + 1) / (count + 1)))
    self.frames += [np.full((HEIGHT, WIDTH, 3), to, np.uint8)] * round(hold * self.fps + 1)
    for n in range(count):
      self.frames.append(_mix(begin(n / self.fps), to, 1 - (n + 1) / (count + 1)))
    self.truth.append(("fade", first, len(self.frames)))
    return self

  def dissolve(self, scene: Scene, end: float, begin: Scene, seconds: float) -> "Reel":
    count, first = round(seconds * self.fps), len(self.frames)
    for n in range(count):
      self.frames.append(_mix(scene(end + n / self.fps), begin(n / self.fps), (n + 1) / (count + 1)))
    self.truth.append(("dissolve", first, len(self.frames)))
    return self

  def flash(self, frames: int, to: int = 255) -> "Reel":
    """Turns the last frames white, or another shade; they are no cut."""
    for n in range(1, frames + 1):
      self.frames[-n] = _mix(self.frames[-n], to, .9)
    return self

  def negative(self, frames: int) -> "Reel":
    """An impact frame: the last frames in inverted colours."""
    for n in range(1, frames + 1):
      self.frames[-n] = 255 - self.frames[-n]
    return self

  def dim(self, frames: int, to: float) -> "Reel":
    """The light over the last frames goes down to `to` and comes back."""
    for n in range(1, frames + 1):
      light = 1 - (1 - to) * np.sin(np.pi * n / (frames + 1))
      self.frames[-n] = (self.frames[-n] * light).astype(np.uint8)
    return self

  def write(self, path: Path, crf: int = 18) -> Path:
    write(path, np.stack(self.frames), self.fps, crf)
    return path


def reel(seed: int) -> Reel:
  """A film of all kinds of scenes, with four cuts, two fades and two dissolves, and with what only looks like cuts."""
  rng = np.random.default_rng(seed)
  fps = float(rng.choice([12, 12, 24, 25, 30]))
  made, scene, at = Reel(fps), any_scene(rng, fps), 0.
  for way in rng.permutation(["cut"] * 4 + ["fade", "dissolve"] * 2):
    length = float(rng.uniform(1., 1.5))
    made.play(scene, length, at)
    if rng.random() < .35:
      trick = rng.choice(["flash", "dark", "negative", "dim"])
      if trick == "dim":
        made.dim(round(.8 * fps), float(rng.uniform(.4, .7)))
      elif trick == "negative":
        made.negative(int(rng.integers(1, 3)))
      else:
        made.flash(int(rng.integers(1, 4)), 255 * (trick == "flash"))
      made.play(scene, .8, at + length)
      length += .8
    after, seconds = any_scene(rng, fps), float(rng.uniform(.4, 1.2))
    if way == "cut":
      made.cut()
    elif way == "fade":
      made.fade(scene, at + length, after, seconds, float(rng.choice([0, .3])), int(rng.choice([0, 0, 255])))
    else:
      made.dissolve(scene, at + length, after, seconds)
    scene, at = after, 0. if way == "cut" else seconds
  return made.play(scene, 1.5, at)


def any_scene(rng: np.random.Generator, fps: float) -> Scene:
  """Drawn, painted or flat; slow or fast; on ones, twos or, at 24 frames a second and more, threes."""
  seed, kind = int(rng.integers(10**9)), rng.random()
  if kind < .5:
    scene = toon(seed)
  elif kind < .8:
    zoom, bright = float(rng.choice([0, 0, .2, -.1])), float(rng.choice([1, 1, .4]))
    scene = clouds(seed, float(rng.choice([0, .1, .3, .6, 1])), zoom, bright)
  else:
    scene = blocks(seed, float(rng.choice([.2, .6])))
  return on(scene, int(rng.choice([1, 2, 3 if fps >= 24 else 1])), fps)


def _mix(a: np.ndarray, b, share: float) -> np.ndarray:
  return np.rint(a * (1 - share) + np.float64(b) * share).astype(np.uint8)


def write(path: Path, frames: np.ndarray, fps: float, crf: int = 18) -> None:
  path.write_bytes(video.encode(frames, float(fps), crf))


def pattern(count: int) -> np.ndarray:
  """[count, 64, 96, 3]: a smooth picture without any symmetry, another for every frame."""
  y, x = np.mgrid[:64, :96].astype(np.float32)
  made = []
  for n in range(count):
    planes = (x * 2 + 20 * np.sin(n / 3), 255 - 3 * y + 2 * (n % 10), 128 + 100 * np.sin((x + 2 * y) / 20 + n / 4))
    made.append(np.clip(np.stack(planes, -1), 16, 240).astype(np.uint8))
  return np.stack(made)


def store(path: Path, frames: np.ndarray, rate=24, codec: str = "libx264", pixels: str = "yuv420p", container=None,
          **more) -> Path:
  """Writes frames, uint8 or uint16 [F, h, w, 3], as asked for.

  more: times (of each picture, in 1 / rate s), options (of the encoder), pixel (its width over its height), transfer
  (of the colours, by FFmpeg's number; BT.2020 then), turn and flip (of the display matrix), front (index first, mp4).
  """
  flags = {"movflags": "faststart"} if more.get("front") else {}
  with av.open(str(path), "w", format=container, options=flags) as file:
    stream = file.add_stream(codec, rate=Fraction(rate))
    _describe(stream, frames, pixels, more)
    stream.codec_context.time_base = 1 / Fraction(rate)
    for number, picture in enumerate(frames):
      wide = picture.dtype == np.uint16
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb48le" if wide else "rgb24")
      frame = frame.reformat(format=pixels, dst_colorspace=9 if wide else None)
      frame.pts, frame.time_base = more.get("times", range(len(frames)))[number], 1 / Fraction(rate)
      file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
  return path


def _describe(stream, frames: np.ndarray, pixels: str, more: dict) -> None:
  stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
  context = stream.codec_context
  context.thread_count = 1
  context.options = {"x265-params": "log-level=none", **more.get("options", {})}
  if "pixel" in more:
    context.sample_aspect_ratio = more["pixel"]
  if "transfer" in more:
    context.color_trc, context.color_primaries, context.colorspace = more["transfer"], 9, 9
  if "turn" in more:
    stream.set_display_rotation(more["turn"], hflip=more.get("flip", False))
