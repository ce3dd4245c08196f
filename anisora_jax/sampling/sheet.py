"""The contact sheet: given | generated | truth, one frame a column, as one png."""

import io
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from anisora_jax.sampling.film import Film, land

PAPER, INK, SOFT = (250, 249, 246), (34, 34, 38), (128, 126, 120)
GIVEN = (232, 89, 12)                          # frames and numbers of what was given
HATCH = (214, 212, 206), (196, 194, 187)       # what was hidden
MOST = 10                                      # columns
GAP, MARGIN, LABEL, RULE = 6, 24, 92, 3        # pixels: between cells, around all, left of the rows, frame of a cell


@dataclass(frozen=True)
class Sheet:
  """One sample to show.

  shown: the clip whose pixels were given. seen: True = given, in pixels or in any coarser grid of cells. truth: None
  where nobody knows it. title, caption: one line each, cut where they do not fit.
  """

  title: str
  caption: str
  shown: Film
  seen: Bool[np.ndarray, "F h w"]
  generated: Film
  truth: Film | None = None


def columns(given: list[int], frames: int, most: int = MOST) -> list[int]:
  """Which frames to show: all if they fit; else both ends, the given ones if those fit, and the widest gaps halved."""
  if frames <= most:
    return list(range(frames))
  chosen = {0, frames - 1, *given}
  if len(chosen) > most:
    chosen = {0, frames - 1}
  while len(chosen) < most:
    left, right = max(pairwise(sorted(chosen)), key=lambda pair: pair[1] - pair[0])
    chosen.add((left + right) // 2)
  return sorted(chosen)


def _cell_size(height: int, width: int) -> tuple[int, int]:
  """Small frames are enlarged by a whole number, so that each pixel stays a square; large ones shrink to 200 wide."""
  if width > 200:
    return max(1, round(height * 200 / width)), 200
  times = max(1, -(-120 // width))
  return height * times, width * times


def _scaled(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
  way = Image.Resampling.NEAREST if size[0] >= frame.shape[0] else Image.Resampling.LANCZOS
  return np.asarray(Image.fromarray(frame).resize(size[::-1], way))


def _veiled(frame: UInt8[np.ndarray, "H W 3"], seen: Bool[np.ndarray, "h w"],
            size: tuple[int, int]) -> UInt8[np.ndarray, "y x 3"]:
  """A frame with everything that was hidden under a hatch."""
  row, column = np.ogrid[:size[0], :size[1]]
  stripes = np.array(HATCH, np.uint8)[(row + column) // 5 % 2]
  shown = seen[row * seen.shape[0] // size[0], column * seen.shape[1] // size[1]]
  return np.where(shown[..., None], _scaled(frame, size), stripes)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
  text = " ".join(text.split())
  if font.getlength(text) <= width:
    return text
  letters = bisect_right(range(len(text)), width, key=lambda letters: font.getlength(text[:letters] + "…")) - 1
  return text[:max(0, letters)].rstrip() + "…"


def draw(sheet: Sheet) -> Image.Image:
  """The sheet as a picture. A frame is framed in colour where it was given, thick if whole and thin if in part."""
  whole, part = sheet.seen.all((1, 2)), sheet.seen.any((1, 2))
  numbers = columns(np.flatnonzero(whole).tolist(), len(sheet.generated))
  size = _cell_size(*sheet.generated.shape[1:3])
  rows = [("given", sheet.shown), ("generated", sheet.generated)]
  rows += [("truth", sheet.truth)] if sheet.truth is not None else []
  left, top = MARGIN + LABEL, MARGIN + 74
  width = left + len(numbers) * (size[1] + GAP) - GAP + MARGIN
  width = max(width, 420)
  page = Image.new("RGB", (width, top + len(rows) * (size[0] + GAP) - GAP + MARGIN), PAPER)
  pen, small, large = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(22)
  pen.text((MARGIN, MARGIN - 4), _fitting(sheet.title, large, width - 2 * MARGIN), INK, large)
  pen.text((MARGIN, MARGIN + 26), _fitting(sheet.caption, small, width - 2 * MARGIN), SOFT, small)
  for j, (label, _) in enumerate(rows):
    pen.text((left - 12, top + j * (size[0] + GAP) + size[0] / 2), label, INK, small, anchor="rm")
  for i, number in enumerate(numbers):
    x = left + i * (size[1] + GAP)
    pen.text((x + size[1] / 2, top - 6), str(number), GIVEN if part[number] else SOFT, small, anchor="mb")
    for j, (label, film) in enumerate(rows):
      y = top + j * (size[0] + GAP)
      cell = _scaled(film[number], size) if label != "given" else _veiled(film[number], sheet.seen[number], size)
      page.paste(Image.fromarray(cell), (x, y))
      if label == "given" and part[number]:
        thick = RULE if whole[number] else 1
        pen.rectangle((x - thick, y - thick, x + size[1] - 1 + thick, y + size[0] - 1 + thick), None, GIVEN, thick)
  return page


def write_sheet(path: str | Path, sheet: Sheet) -> None:
  """Writes the sheet as a png, whole or not at all. Raises BadInput where the folder or the disk refuses."""
  out = io.BytesIO()
  draw(sheet).save(out, "PNG", optimize=True)
  land(path, out.getvalue())
