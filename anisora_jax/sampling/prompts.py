"""What is asked for, as AniSora's users write it: prompt files, scores in the caption, positions and sizes of films.

A prompt file has a film a line, `PROMPT@@first.png,last.png&&0,1`: what to show, stills, and where each stands, 0 the
first frame and 1 the last. `PROMPT@@still.png` puts its still first; a line without @@ is made from its text alone.
From: bilibili/Index-anisora, anisoraV3.2/generate_txt_new.py and wan/image2video.py.
"""

import codecs
import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from anisora_jax.errors import BadInput, pick

FORM = "PROMPT@@first.png,last.png&&0,1"
STEP = 8  # frames between the places where AniSora's weights have seen stills

NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
            "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
            "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NEGATIVES = {  # what guidance steers away from unless told otherwise; published for Wan, and without effect at scale 1
  "wan": NEGATIVE,                                    # Wan2.1 text-to-video, Wan2.2: wan/configs/shared_config.py
  "wan21_i2v": "镜头晃动，" + NEGATIVE,                # Wan2.1: wan/configs/wan_i2v_14B.py, adds "shaking camera"
  "wan21_flf2v": "镜头切换，镜头晃动，" + NEGATIVE,     # Wan2.1: wan/configs/__init__.py, adds "cut"
}


@dataclass(frozen=True)
class Line:
  """One film of a prompt file.

  images: files, the first listed sets the film's aspect and is what an image encoder sees. positions: where each image
  stands, 0 first frame .. 1 last frame, in any order. number: of the line, from 1.
  """

  prompt: str
  images: tuple[str, ...] = ()
  positions: tuple[float, ...] = ()
  number: int = 1

  def __post_init__(self):
    if not self.prompt and not any(self.images):
      raise BadInput(f"neither a prompt nor an image: write {FORM}.")
    if not all(self.images):
      raise BadInput(f"the name of an image is empty: write {FORM}, or no @@ for a film from text alone.")
    if len(self.images) != len(self.positions):
      raise BadInput(f"{len(self.images)} images and {len(self.positions)} positions, none written being one at 0: "
                     f"give each image its position, as in {FORM}.")
    for position in self.positions:
      _check_position(position)
    if len(set(self.positions)) < len(self.positions):
      twice = max(self.positions, key=self.positions.count)
      raise BadInput(f"position {twice:g} is given to more than one image: give each its own.")


def _check_position(position: float) -> None:
  if not 0 <= position <= 1:
    raise BadInput(f"position {position:g} is outside the film: take 0 (first frame) .. 1 (last frame).")


def _position(word: str) -> float:
  try:
    return float(word)
  except ValueError:
    raise BadInput(f"position {word.strip()!r} is not a number: take 0 (first frame) .. 1 (last frame), as in "
                   f"{FORM}.") from None


def parse_line(text: str, number: int = 1) -> Line:
  """Reads one line; the prompt may hold commas and ampersands, an image's name neither. Raises BadInput."""
  prompt, at, rest = text.partition("@@")
  if "@@" in rest:
    raise BadInput(f"@@ stands more than once: it only parts the prompt from its images, as in {FORM}.")
  if not at:
    return Line(prompt.strip(), number=number)
  names, given, places = rest.partition("&&")
  images = tuple(name.strip() for name in names.split(","))
  positions = tuple(_position(word) for word in (places if given else "0").split(","))
  return Line(prompt.strip(), images, positions, number)


def _find(image: str, folder: Path) -> str:
  # os.path, not Path: a prompt in an image's place is longer than a file name may be, and Path.is_file would raise.
  for path in (folder / image, Path(image)):
    if os.path.isfile(path):
      return str(path)
  raise BadInput(f"image {image} is neither in the prompt file's folder nor at that path from here: check its name, "
                 "and that the prompt stands before @@.")


def read_prompts(path: str | Path) -> list[Line]:
  """The films of a prompt file in UTF-8, any line ends; blank lines and lines that begin with # are passed over.

  Images are sought from the file's folder, then, as AniSora does, from the current one, and must be there. Raises
  BadInput that names the file and the line.
  """
  path = Path(path)
  if not path.is_file():
    raise BadInput(f"prompt file {path} does not exist or is a folder: give a text file of lines {FORM}.")
  lines = []
  for number, written in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
    try:
      text = written.decode("utf-8").strip()
      if text and not text.startswith("#"):
        line = parse_line(text, number)
        lines.append(replace(line, images=tuple(_find(image, path.parent) for image in line.images)))
    except UnicodeDecodeError:
      raise BadInput(f"{path}, line {number}: not UTF-8: save the file as UTF-8 (AniSora V3 wanted GBK).") from None
    except BadInput as mistake:
      raise BadInput(f"{path}, line {number}: {mistake}") from None
  if not lines:
    raise BadInput(f"prompt file {path} has no lines: write one a film, as in {FORM}.")
  return lines


def keyframe(position: float, frames: int) -> int:
  """The pixel frame that an image at `position` of a film of `frames` = 8k + 1 frames becomes: a multiple of 8.

  Halves go to the even multiple: of 81 frames, position 0.25 is frame 16 and not 24. Raises BadInput.
  """
  _check_position(position)
  if frames < 1 or frames % STEP != 1:
    below = max(frames - 1, 0) // STEP * STEP + 1
    raise BadInput(f"a film of {frames} frames does not end in a keyframe, one in {STEP} is: take {STEP}k + 1 frames, "
                   f"for example {below} or {below + STEP}.")
  return round(int((frames - 1) * position) / STEP) * STEP


def keyframes(line: Line, frames: int) -> dict[int, str]:
  """Frame -> image, in the line's order. Raises BadInput if two images fall on one frame."""
  taken: dict[int, str] = {}
  for image, position in zip(line.images, line.positions, strict=True):
    frame = keyframe(position, frames)
    if frame in taken:
      raise BadInput(f"line {line.number}: {taken[frame]} and {image} both fall on frame {frame} of {frames}, by steps "
                     f"of {STEP}: move them apart, or make a longer film.")
    taken[frame] = image
  return taken


def _floors(height: int, width: int, area: int, cell: int) -> tuple[int, int]:
  """The sides of a picture of `area` pixels and the given aspect, each rounded down to whole cells."""
  return math.isqrt(area * height // width) // cell * cell, math.isqrt(area * width // height) // cell * cell


def _nearest_aspect(height: int, width: int, area: int, cell: int) -> tuple[int, int]:
  """Rounds one side down, gives the other what is left of the area, and takes the better aspect of the two ways."""
  tall, wide = _floors(height, width, area, cell)
  ways = ((tall, area // (tall * cell) * cell), (area // (wide * cell) * cell, wide))

  def stretch(size: tuple[int, int]) -> Fraction:
    aspect = Fraction(size[1] * height, size[0] * width)
    return max(aspect, 1 / aspect)

  return min(ways, key=stretch)


SIZES = {  # a model's task -> how the film's size follows from its first image
  "i2v": _floors,            # AniSora, Wan2.1 I2V and FLF2V, Wan2.2 I2V-A14B: wan/image2video.py
  "ti2v": _nearest_aspect,   # Wan2.2 TI2V-5B: best_output_size in wan/utils/utils.py
}


FITS = {  # the same -> how that image is brought to the size, in given.FITS
  "i2v": "stretch",
  "ti2v": "crop",
}


def size_of(height: int, width: int, area: int, cell: int, rule: str = "i2v") -> tuple[int, int]:
  """The (height, width) of a film of about, and never above, `area` pixels in the aspect of its first image.

  height, width: of the image. cell: pixels a side of one token, the codec's stride times the patch: 16 for Wan2.1's
  codec, 32 for Wan2.2's. rule: in SIZES. Counts in whole numbers: where upstream's floats fall just short of a whole
  cell they lose it (an 832 x 480 image at 832 * 480 pixels becomes 832 x 464 there, and stays as it is here).
  Raises BadInput.
  """
  rule_of = pick(SIZES, rule, "rule of sizes")
  if min(height, width, area) < 1 or not all(_floors(height, width, area, cell)):
    raise BadInput(f"an image of {width} x {height} makes no film of {area} pixels with sides of at least {cell}: take "
                   "a larger area, or an image less long.")
  return rule_of(height, width, area, cell)


def suffix(aesthetic: float | None = None, motion: float | None = None, camera: str | None = None,
           no_text: bool = False) -> str:
  """What AniSora's captions end in, to follow the prompt after a space; what is None is left out.

  aesthetic: 0 .. 10; 5.0 to 7.0 is recommended, 5.5 was the rule. motion: 0.5 to 1.5 is recommended for V1, 1 to 2 for
  V2, 2 to 4 for V3, V3.1 and V3.2; written with one decimal, as in training. camera: a phrase such as "tilt up".
  no_text: asks for no captions in the picture, which V3 and later call mandatory. Raises BadInput.
  From: anisoraV3/README.md, "Prompt Format Specification"; camera motion from the data of V1 and V2.
  """
  parts = []
  if aesthetic is not None:
    if not 0 <= aesthetic <= 10:
      raise BadInput(f"aesthetic score {aesthetic:g} is outside 0 .. 10: take 5.0 to 7.0.")
    parts.append(f"aesthetic score: {aesthetic:.1f}.")
  if motion is not None:
    if not 0 <= motion < math.inf:
      raise BadInput(f"motion score {motion:g} is not a number from 0: take 2.0 to 4.0, for AniSora V1 and V2 less.")
    parts.append(f"motion score: {motion:.1f}.")
  if camera is not None:
    if not camera.strip() or not camera.isprintable() or "." in camera or "@@" in camera:
      raise BadInput(f"camera motion {camera!r} is not one phrase: give a few words without a full stop, as 'tilt up'.")
    parts.append(f"camera motion: {camera.strip()}.")
  if no_text:
    parts.append("There is no text in the video.")
  return " ".join(parts)
