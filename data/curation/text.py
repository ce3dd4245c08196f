"""Text on the screen: the lines that can be read, and the share of the picture they take.

A detector is a function: picture in, lines of text out. "ppocr" is PP-OCRv6 (small) by the package rapidocr, whose
wheel carries the weights. Its detector alone takes cartoon eyes, ears and antennae for letters, so what it finds is
also read, and only what reads as at least two letters or digits counts; "O", "0" and "C" are none, as eyes read "OO".
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib import util
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from anisora_jax.errors import BadInput, pick

LONGER_SIDE = 448  # pixels of the picture in which lines are sought; letters of 4 % of the height are found
SURE = .8          # least confidence of a reading; drawn text reads above .9, drawings up to .84
SHORTEST_LINE = [3, 48, 96]  # channels, rows, columns of a line as it is read; the usual 320 pads eyes at great cost
RINGS = frozenset("OoCc0QＯ〇○")

Picture = UInt8[np.ndarray, "h w 3"]


class Line(NamedTuple):
  """A line of text: what it says, and its box in pixels, without margins where its surroundings are plain."""
  words: str
  left: int
  top: int
  right: int
  bottom: int


Detector = Callable[[Picture], list[Line]]


def is_text(words: str, sure: float) -> bool:
  """Whether a reading is one of text, not of a drawing that looks like a letter or two."""
  letters = [c for c in words if unicodedata.category(c)[0] in "LN" and c not in RINGS]
  return sure >= SURE and len(letters) >= 2


def trimmed(grey: UInt8[np.ndarray, "h w"], corners: Float[np.ndarray, "4 2"]) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of a detected quadrilateral, less the empty margins that detectors leave.

  Ink is where brightness changes from pixel to pixel by a third of what it does at the text's edges.
  """
  height, width = grey.shape
  left, top = np.clip(np.floor(corners.min(0)), 0, (width - 1, height - 1)).astype(int)
  right, bottom = np.clip(np.ceil(corners.max(0)) + 1, (left + 1, top + 1), (width, height)).astype(int)
  part = grey[top:bottom, left:right].astype(np.int16)
  down, across = np.diff(part, axis=0, prepend=part[:1]), np.diff(part, axis=1, prepend=part[:, :1])
  change = np.maximum(np.abs(down), np.abs(across))
  ink = change > .35 * np.percentile(change, 98)
  rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
  if not len(rows):
    return int(left), int(top), int(right), int(bottom)
  return int(left + columns[0]), int(top + rows[0]), int(left + columns[-1] + 1), int(top + rows[-1] + 1)


def ppocr() -> Detector:
  """PP-OCRv6 by rapidocr on one thread. Raises BadInput where the packages or the weights are missing."""
  if not (util.find_spec("rapidocr") and util.find_spec("onnxruntime")):
    raise BadInput("text detector 'ppocr' needs rapidocr and onnxruntime: pip install 'anisora_jax[curation]', or set "
                   "config.measure.text_detector = 'none'.")
  import rapidocr
  models = Path(rapidocr.__file__).parent / "models"
  weights = {part: models / f"PP-OCRv6_{part.lower()}_small.onnx" for part in ("Det", "Rec")}
  for path in weights.values():
    # Told by name, as the package would else fetch them from the network.
    if not path.is_file():
      raise BadInput(f"rapidocr is here without its weights {path.name}: pip install 'rapidocr>=3.10', whose wheel has "
                     "them, or set config.measure.text_detector = 'none'.")
  engine = rapidocr.RapidOCR(params={
    "Global.use_cls": False, "Global.text_score": 0., "Global.log_level": "critical",
    "Global.use_vertical_padding": False, "Rec.rec_img_shape": SHORTEST_LINE,
    "Det.limit_side_len": LONGER_SIDE, "Det.limit_type": "max", "Det.box_thresh": .3, "Det.unclip_ratio": 1.3,
    "Det.use_dilation": False,
    **{f"{part}.model_path": str(path) for part, path in weights.items()},
    "EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1})

  def detect(picture: Picture) -> list[Line]:
    found = engine(np.ascontiguousarray(picture[..., ::-1]))
    if found.boxes is None or found.txts is None:
      return []
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return [Line(words, *trimmed(grey, np.asarray(corners, np.float64)))
            for corners, words, sure in zip(found.boxes, found.txts, found.scores, strict=True) if is_text(words, sure)]
  return detect


DETECTORS = {"ppocr": ppocr}


@cache
def detector(name: str) -> Detector:
  """The detector of that name, loaded once in a process. Raises BadInput."""
  return pick(DETECTORS, name, "text detector")()


def area(lines: Sequence[Line], height: int, width: int) -> float:
  """Share of a picture that boxes of text cover, 0 .. 1; where they overlap they count once."""
  covered = np.zeros((height, width), bool)
  for line in lines:
    covered[line.top:line.bottom, line.left:line.right] = True
  return float(covered.mean())
