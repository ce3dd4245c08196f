"""How sharp, flat, bright and wordy a picture is measured to be is what was drawn."""

import shutil
import subprocess
from functools import cache

import cartoon
import cv2
import numpy as np
import pytest
import skimage.color
import skimage.data
import toons
from curation import picture, text
from PIL import Image, ImageDraw, ImageFont

from anisora_jax.errors import BadInput

LINES = ("I never said the moon was mine.", "Wait for me at the river", "Where did everybody go tonight?", "Episode 12",
         "THE LONG WAY HOME", "Director of photography", "Anna Marie Bergstrom", "Original story and screenplay")


@cache
def still(seed: int, height: int = 480, width: int = 832) -> np.ndarray:
  rng = np.random.default_rng(seed)
  shot = toons.plan_shot(rng, str(rng.choice(list(cartoon.PLACES))), 4, 100 * width / height)
  return toons.draw_frame(shot, 1., height, width)[0]


def photographs() -> list[np.ndarray]:
  return [getattr(skimage.data, name)()[..., :3] for name in ("astronaut", "coffee", "chelsea", "rocket")]


def grey_step(blur: float) -> np.ndarray:
  row = np.where(np.arange(832) < 400, 40., 200.).astype(np.float32)
  row = cv2.GaussianBlur(row[None], (0, 0), blur)[0] if blur else row
  return np.broadcast_to(np.rint(row).astype(np.uint8)[None, :, None], (480, 832, 3)).copy()


@pytest.mark.parametrize("blur", [1, 2, 3, 5, 8])
def test_the_sharpness_of_an_edge_gives_its_blur_away(blur):
  assert picture.sharpness(grey_step(blur)) == pytest.approx((1 + blur**2) ** -.5, rel=.05)


def test_blur_lowers_sharpness_noise_raises_it_and_contrast_leaves_it():
  for seen in [*(still(seed) for seed in range(3)), *photographs()[:2]]:
    soft = [picture.sharpness(cv2.GaussianBlur(seen, (0, 0), blur)) for blur in (.5, 1, 2, 4, 8)]
    assert (np.diff([picture.sharpness(seen), *soft]) < 0).all()
    faint = np.rint(seen * .5 + 60).astype(np.uint8)
    assert picture.sharpness(faint) == pytest.approx(picture.sharpness(seen), rel=.02)
    noisy = np.clip(seen + np.random.default_rng(0).normal(0, 25, seen.shape), 0, 255).astype(np.uint8)
    assert picture.sharpness(noisy) > picture.sharpness(seen)
  assert picture.sharpness(np.full((90, 160, 3), 77, np.uint8)) == 0


def test_noise_lowers_flatness_and_widens_the_palette():
  for seed in range(3):
    noise = np.random.default_rng(seed).normal(0, 1, still(seed).shape)
    noisy = [np.clip(still(seed) + level * noise, 0, 255).astype(np.uint8) for level in (0, 1, 2, 4, 8)]
    assert (np.diff([picture.flatness(seen) for seen in noisy]) < 0).all()
    assert picture.palette(noisy[4]) > 2 * picture.palette(noisy[0])


@pytest.mark.parametrize("colours", [1, 3, 20, 60])
def test_the_palette_counts_the_colours_that_fill_nine_tenths(colours):
  paints = np.random.default_rng(0).permutation(16**3)[:colours]
  paints = np.stack([paints // 256, paints // 16 % 16, paints % 16], -1) * 16 + 8
  columns = paints[np.arange(1280) * colours // 1280].astype(np.uint8)
  assert picture.palette(np.repeat(columns[None], 720, 0)) == pytest.approx(np.ceil(.9 * colours), abs=1)


def test_the_size_a_cartoon_is_drawn_at_hardly_matters_and_enlarging_makes_it_soft():
  for seed in range(3):
    seen, larger = (picture.look(still(seed, height, height * 26 // 15)) for height in (480, 750))
    assert abs(larger.pop("palette") - seen.pop("palette")) <= 2
    assert larger == pytest.approx(seen, rel=.05)
    small = cv2.resize(still(seed), (278, 160), interpolation=cv2.INTER_AREA)
    for soft in (small, cv2.resize(small, (832, 480))):
      assert picture.sharpness(soft) < .8 * seen["sharpness"]


def test_cartoons_are_flatter_than_photographs_and_have_fewer_colours():
  drawn, seen = ([picture.look(one) for one in many] for many in ([still(seed) for seed in range(8)], photographs()))
  assert min(look["flatness"] for look in drawn) > max(look["flatness"] for look in seen)
  assert max(look["palette"] for look in drawn) < min(look["palette"] for look in seen)


def test_light_is_what_pillow_and_scikit_image_say():
  for seen in (still(0), photographs()[0]):
    luma = np.asarray(Image.fromarray(seen).convert("L")) / 255.
    hsv = skimage.color.rgb2hsv(seen)
    expected = (luma.mean(), luma.std(), (hsv[..., 1] * hsv[..., 2]).mean())
    assert picture.light(seen) == pytest.approx(expected, abs=.002)


# Text

def ink(with_text: np.ndarray, without: np.ndarray) -> tuple[int, int, int, int] | None:
  """The box (left, top, right, bottom) of what a line of text changed visibly."""
  seen = (np.abs(with_text.astype(int) - without) > 40).max(-1)
  if not seen.any():
    return None
  rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
  return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


class Page:
  """A picture that text is written on. truth: where its boxes are."""

  def __init__(self, back: np.ndarray):
    self.image, self.truth, self.words = Image.fromarray(back), np.zeros(back.shape[:2], bool), []

  def write(self, x: float, y: float, words: str, font, **how) -> None:
    before = np.asarray(self.image)
    ImageDraw.Draw(self.image).text((x, y), words, font=font, anchor="ms", **how)
    left, top, right, bottom = ink(np.asarray(self.image), before)
    self.truth[top:bottom, left:right] = True
    self.words.append(words)


def planted(kind: str, seed: int) -> Page:
  rng = np.random.default_rng(seed)
  back = still(seed) if kind != "credits" else np.full((480, 832, 3), (12, 12, 20), np.uint8)
  page, (height, width) = Page(back), back.shape[:2]
  outlined = dict(stroke_width=2, stroke_fill="black")
  if kind == "subtitle":
    font, colour = ImageFont.load_default(int(rng.integers(24, 34))), str(rng.choice(["white", "yellow"]))
    for line in range(lines := int(rng.integers(1, 3))):
      y = height - 24 - (lines - 1 - line) * 1.4 * font.size
      page.write(width / 2, y, str(rng.choice(LINES)), font, fill=colour, **outlined)
  elif kind == "credits":
    font = ImageFont.load_default(int(rng.integers(20, 28)))
    for line in range(int(rng.integers(4, 8))):
      page.write(width / 2, 60 + line * 1.8 * font.size, str(rng.choice(LINES)), font, fill="white")
  else:
    left, top = int(rng.integers(20, 560)), int(rng.integers(20, 200))
    ImageDraw.Draw(page.image).rectangle((left, top, left + 240, top + 90), (240, 230, 200), "black", 3)
    page.write(left + 120, top + 60, str(rng.choice(["OPEN", "BAKERY", "No. 27", "BOOKS"])),
               ImageFont.load_default(int(rng.integers(36, 50))), fill="black")
  return page


@cache
def found(kind: str, seed: int) -> tuple[float, float, list[str], list[str]]:
  """(measured area, true area, words read, words written)."""
  page = planted(kind, seed)
  lines = text.detector("ppocr")(np.asarray(page.image))
  return text.area(lines, 480, 832), page.truth.mean(), [line.words for line in lines], page.words


@pytest.mark.parametrize("kind", ["subtitle", "credits", "sign"])
def test_the_area_of_text_is_that_of_the_boxes_it_was_written_in(kind):
  shares = np.array([np.divide(*found(kind, seed)[:2]) for seed in range(8)])
  assert np.median(shares) == pytest.approx(1, abs=.1)
  assert np.abs(shares - 1).max() <= .2, shares


def test_what_counts_as_text_was_read_right():
  pages = [found(kind, seed) for kind in ("subtitle", "credits", "sign") for seed in range(8)]
  def plain(words):
    return "".join(words).replace(" ", "")
  right = [plain([word]) in plain(read) for _, _, read, written in pages for word in written]
  assert np.mean(right) >= .8


def test_drawings_without_text_have_none():
  canvas = np.full((480, 832, 3), 245, np.uint8)
  stripes, grid, lines, bricks = (canvas.copy() for _ in range(4))
  stripes[:, np.arange(832) % 24 < 9] = 30
  grid[np.arange(480) % 32 < 3] = grid[:, np.arange(832) % 32 < 3] = 60
  rng = np.random.default_rng(0)
  for _ in range(60):
    cv2.polylines(lines, [rng.integers(0, (832, 480), (5, 2)).astype(np.int32)], False, (20, 20, 20), 2, cv2.LINE_AA)
  for row in range(0, 480, 40):
    for column in range(-(row // 40 % 2) * 40, 832, 80):
      cv2.rectangle(bricks, (column, row), (column + 74, row + 34), (150, 70, 60), -1)
  shares = [text.area(text.detector("ppocr")(seen), 480, 832)
            for seen in [*(still(seed) for seed in range(20)), stripes, grid, lines, bricks, canvas]]
  assert np.mean(np.array(shares) == 0) >= .95 and max(shares) < .003, shares


@pytest.mark.parametrize("vertical", [False, True])
def test_japanese_is_found_across_and_down(vertical):
  listed = subprocess.run(["fc-list", ":lang=ja", "file"], capture_output=True, text=True).stdout if shutil.which(
    "fc-list") else ""
  if not listed.strip():
    pytest.skip("no font for Japanese on this machine")
  font, page = ImageFont.truetype(sorted(listed.splitlines())[0].rstrip(": "), 30), Page(still(1))
  words = "今夜みんなどこへ行った"
  for place, letters in enumerate(words if vertical else [words]):
    page.write(760 if vertical else 416, 60 + 32 * place if vertical else 450, letters, font, fill="white",
               stroke_width=2, stroke_fill="black")
  read = "".join(line.words for line in text.detector("ppocr")(np.asarray(page.image)))
  assert len(set(read) & set(words)) >= 8


@pytest.mark.parametrize(("words", "sure", "counts"), [
  ("OO", .99, False), ("0oC", .99, False), ("福", .99, False), ("Yoo", .95, False), ("- .", .99, False),
  ("No. 27", .9, True), ("第十二話", .9, True), ("Episode", .79, False), ("ab", .8, True)])
def test_eyes_and_single_signs_are_no_text(words, sure, counts):
  assert text.is_text(words, sure) is counts


def test_boxes_that_overlap_count_once_and_margins_are_trimmed():
  lines = [text.Line("a", 0, 0, 50, 50), text.Line("b", 25, 0, 75, 50)]
  assert text.area(lines, 100, 100) == .375 and text.area([], 10, 10) == 0
  grey = np.full((60, 100), 200, np.uint8)
  grey[20:30, 40:70] = 10
  loose = np.array([(30., 10), (80, 10), (80, 40), (30, 40)])
  assert text.trimmed(grey, loose) == (40, 20, 71, 31)
  assert text.trimmed(np.full((60, 100), 200, np.uint8), loose) == (30, 10, 81, 41)


def test_a_detector_that_is_not_here_is_told_in_one_line(monkeypatch):
  with pytest.raises(BadInput, match=r"no text detector is named 'ppocrr': did you mean 'ppocr'\?"):
    text.detector("ppocrr")
  monkeypatch.setattr(text.util, "find_spec", lambda name: None)
  with pytest.raises(BadInput, match=r"needs rapidocr and onnxruntime: pip install 'anisora_jax\[curation\]'"):
    text.ppocr()
