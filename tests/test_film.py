"""Films, gifs and sheets that are written, and the stills, films and masks that a user gives."""

import errno
import os
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageFont
from skimage.metrics import peak_signal_noise_ratio

from anisora_jax.errors import BadInput
from anisora_jax.sampling import film, given, sheet
from anisora_jax.sampling.request import Request, lay_out


def smooth(frames=7, height=34, width=50):
  """Soft waves that drift: every frame differs, and halved colour loses little."""
  f, y, x = np.ogrid[:frames, :height, :width]
  waves = [np.sin(x / 9 + f / 3), np.cos(y / 8 - f / 4), np.sin((x + y) / 14 + f / 5)]
  return np.stack([128 + 90 * np.broadcast_to(wave, (frames, height, width)) for wave in waves], -1).astype(np.uint8)


def decode(path):
  """Frames and rate by FFmpeg's own conversion, a witness that shares no line with ours."""
  with av.open(str(path)) as container:
    rate = container.streams.video[0].average_rate
    return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]), rate


@pytest.mark.parametrize("fps", [8.0, 16.0, 24000 / 1001, 12.5])
def test_an_mp4_keeps_frames_rate_and_picture(tmp_path, fps):
  film.write_mp4(tmp_path / "a.mp4", smooth(), fps)
  frames, rate = decode(tmp_path / "a.mp4")
  assert frames.shape == smooth().shape
  assert rate == Fraction(fps).limit_denominator(1001)
  assert peak_signal_noise_ratio(smooth(), frames) > 35
  assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("size", [(1, 33, 49), (3, 1, 1), (2, 17, 16), (1, 16, 16)])
def test_odd_and_single_frame_films_play(tmp_path, size):
  film.write_mp4(tmp_path / "a.mp4", smooth(*size), 8.0)
  frames, _ = decode(tmp_path / "a.mp4")
  f, h, w = size
  assert frames.shape == (f, h + h % 2, w + w % 2, 3)
  assert peak_signal_noise_ratio(smooth(*size), frames[:, :h, :w]) > 30  # colour of a lone last column is shared


def test_enlarging_makes_squares_of_pixels(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
  film.write_gif(tmp_path / "a.gif", noise[:1, :8, :8], 8.0, times=3)
  page = np.asarray(Image.open(tmp_path / "a.gif").convert("RGB"))
  np.testing.assert_array_equal(page, noise[0, :8, :8].repeat(3, 0).repeat(3, 1))
  film.write_mp4(tmp_path / "a.mp4", noise, 8.0, times=8)
  frames, _ = decode(tmp_path / "a.mp4")
  assert peak_signal_noise_ratio(noise, frames[:, 4::8, 4::8]) > 30


@pytest.mark.parametrize(("fps", "kept"), [(8.0, 7), (12.0, 7), (50.0, 7), (60.0, 4), (120.0, 3)])
def test_a_gif_has_all_frames_and_lasts_as_long(tmp_path, fps, kept):
  film.write_gif(tmp_path / "a.gif", smooth(), fps)
  with Image.open(tmp_path / "a.gif") as image:
    delays = []
    for number in range(image.n_frames):
      image.seek(number)
      delays.append(image.info["duration"])
      nth = int(-(-fps // 50))
      assert peak_signal_noise_ratio(smooth()[number * nth], np.asarray(image.convert("RGB"))) > 25
  assert len(delays) == kept
  assert abs(sum(delays) - 1000 * kept * nth / fps) <= 5
  assert min(delays) >= 20


def test_a_gif_of_still_frames_is_still_and_as_long(tmp_path):
  still = np.repeat(smooth(1), 5, 0)
  film.write_gif(tmp_path / "a.gif", still, 10.0)
  with Image.open(tmp_path / "a.gif") as image:
    total = 0
    for number in range(image.n_frames):
      image.seek(number)
      total += image.info["duration"]
  assert total == 500


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_costs_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, number):
  film.write_gif(tmp_path / "a.gif", smooth(2), 8.0)
  before = (tmp_path / "a.gif").read_bytes()

  def refuse(self, data):
    self.open("wb").write(data[:10])  # as a disk does that fills half-way
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
  with pytest.raises(BadInput, match=os.strerror(number)) as refusal:
    film.write_gif(tmp_path / "a.gif", smooth(3), 8.0)
  assert "\n" not in str(refusal.value)
  assert os.listdir(tmp_path) == ["a.gif"] and (tmp_path / "a.gif").read_bytes() == before


def a_sheet(seen, frames=None, truth=True):
  clip = smooth(len(seen), 16, 24) if frames is None else frames
  return sheet.Sheet("in-between", "waves", clip, seen, clip[::-1], clip if truth else None)


def cells(picture, the_sheet):
  """The sheet cut into [rows, columns] of cells, each with a border of 3 pixels."""
  high, wide = sheet._cell_size(16, 24)
  left, top = sheet.MARGIN + sheet.LABEL, sheet.MARGIN + 74
  page = np.asarray(picture)
  rows = 3 if the_sheet.truth is not None else 2
  return [[page[top + r * (high + sheet.GAP) - 3:top + r * (high + sheet.GAP) + high + 3,
                left + c * (wide + sheet.GAP) - 3:left + c * (wide + sheet.GAP) + wide + 3]
           for c in range(len(the_sheet.generated))] for r in range(rows)]


def is_colour(pixels, colour):
  return (pixels.reshape(-1, 3) == colour).all()


def test_a_sheet_frames_what_was_given_and_hides_the_rest():
  seen = np.zeros((5, 4, 6), bool)
  seen[[0, 4]] = True
  one = a_sheet(seen)
  given_row, generated, truth = cells(sheet.draw(one), one)
  for number, cell in enumerate(given_row):
    assert is_colour(cell[0], sheet.GIVEN if seen[number].all() else sheet.PAPER)
    inside = cell[3:-3, 3:-3]
    if seen[number].all():
      np.testing.assert_array_equal(inside[::5, ::5][:16, :24], one.shown[number])
    else:
      assert set(map(tuple, inside.reshape(-1, 3))) == set(sheet.HATCH)
  for number in range(5):
    np.testing.assert_array_equal(generated[number][5:-3:5, 5:-3:5], one.generated[number])
    np.testing.assert_array_equal(truth[number][5:-3:5, 5:-3:5], one.truth[number])


def test_a_sheet_hatches_the_hidden_part_of_a_region_and_nothing_else():
  seen = np.ones((3, 4, 6), bool)
  seen[1:, 1:3, 2:5] = False
  one = a_sheet(seen, truth=False)
  given_row, _ = cells(sheet.draw(one), one)
  for number, cell in enumerate(given_row):
    inside, fine = cell[5:-3:5, 5:-3:5], seen[number].repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(inside[fine], one.shown[number][fine])
    assert {tuple(pixel) for pixel in inside[~fine]} <= set(sheet.HATCH)
    assert is_colour(cell[2, 2:-2], sheet.GIVEN) and is_colour(cell[0], sheet.PAPER if number else sheet.GIVEN)


def test_hidden_pixels_do_not_reach_the_given_row():
  seen = np.zeros((4, 2, 3), bool)
  seen[0] = True
  clip = smooth(4, 16, 24)
  other = clip.copy()
  other[1:] = 255 - other[1:]
  pictures = [sheet.draw(sheet.Sheet("a", "b", shown, seen, clip)) for shown in (clip, other)]
  np.testing.assert_array_equal(*map(np.asarray, pictures))


@pytest.mark.parametrize(("keys", "frames"), [([], 49), ([0, 13, 48], 49), (list(range(30)), 49), ([5], 7), ([], 1)])
def test_a_long_film_shows_its_ends_and_keyframes(keys, frames):
  shown = sheet.columns(keys, frames)
  assert shown == sorted(set(shown)) and len(shown) == min(frames, sheet.MOST)
  assert shown[0] == 0 and shown[-1] == frames - 1
  assert len(keys) > sheet.MOST or set(keys) <= set(shown)
  assert max(np.diff(shown), default=1) <= max(1, frames // 2)


def test_a_sheet_of_large_frames_and_long_words_is_written(tmp_path):
  clip = smooth(12, 360, 640)
  seen = np.zeros((12, 45, 80), bool)
  sheet.write_sheet(tmp_path / "a.png", sheet.Sheet("task " * 80, "line\nbreak " * 200, clip, seen, clip))
  with Image.open(tmp_path / "a.png") as image:
    assert image.size[0] < 2400
  assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("words", ["short", "many words " * 50, "W" * 900, "", " two\nlines "])
def test_a_line_of_a_sheet_fits_or_is_cut_where_it_must(words):
  font = ImageFont.load_default(14)
  line, whole = sheet._fitting(words, font, 300), " ".join(words.split())
  assert font.getlength(line) <= 300 and "\n" not in line
  assert line == whole or (line.endswith("…") and whole.startswith(line[:-1]) and font.getlength(line) > 270)


def png(path, array, **options):
  Image.fromarray(array).save(path, **options)
  return path


def test_a_png_is_read_exactly_and_a_turned_jpg_upright(tmp_path):
  picture = smooth(1)[0]
  np.testing.assert_array_equal(given.read_image(png(tmp_path / "a.png", picture)), picture)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  turned = given.read_image(png(tmp_path / "a.jpg", picture, exif=exif, quality=98))
  assert peak_signal_noise_ratio(np.rot90(picture, -1), turned) > 30


def test_grey_deep_and_transparent_images_are_read(tmp_path):
  grey = smooth(1)[0, ..., 0]
  np.testing.assert_array_equal(given.read_image(png(tmp_path / "g.png", grey)), np.repeat(grey[..., None], 3, -1))
  deep = given.read_image(png(tmp_path / "d.png", grey.astype(np.uint16) * 257))
  np.testing.assert_array_equal(deep, np.repeat(grey[..., None], 3, -1))
  clear = np.zeros((4, 4, 4), np.uint8)
  assert is_colour(given.read_image(png(tmp_path / "c.png", clear)), (255, 255, 255))


def test_a_film_is_read_whole_in_part_and_at_another_pace(tmp_path):
  clip = smooth(12)
  film.write_mp4(tmp_path / "a.mp4", clip, 24.0)
  whole = given.read_film(tmp_path / "a.mp4")
  assert whole.shape == clip.shape and peak_signal_noise_ratio(clip, whole) > 35
  for options, indices in [({"count": 5}, range(5)), ({"count": 5, "end": True}, range(7, 12)),
                           ({"fps": 8.0}, range(0, 12, 3)), ({"fps": 48.0, "count": 3}, [0, 0, 1]),
                           ({"fps": 8.0, "count": 2, "end": True}, [6, 9])]:
    np.testing.assert_array_equal(given.read_film(tmp_path / "a.mp4", **options), whole[list(indices)], str(options))


def test_white_of_a_mask_is_given(tmp_path):
  mask = np.zeros((16, 24), bool)
  mask[4:9, 3:20] = True
  still = given.read_mask(png(tmp_path / "m.png", mask.astype(np.uint8) * 255))
  np.testing.assert_array_equal(still, mask[None])
  moving = np.stack([np.roll(mask, shift, 0) for shift in range(3)])
  film.write_mp4(tmp_path / "m.mp4", moving[..., None].repeat(3, -1).astype(np.uint8) * 255, 8.0)
  assert (given.read_mask(tmp_path / "m.mp4") == moving).mean() > .99


def test_a_mask_film_keeps_the_pace_of_the_clip_it_is_painted_for(tmp_path):
  hidden = (np.arange(6) == np.arange(9)[:, None] % 6)[:, None].repeat(32, 1).repeat(8, 2)  # a column that travels
  film.write_mp4(tmp_path / "m.mp4", ~hidden[..., None].repeat(3, -1) * np.uint8(255), 24.0)
  film.write_mp4(tmp_path / "c.mp4", smooth(9, 32, 48), 24.0)
  request = Request(5, 32, 48, 12.0, clip=str(tmp_path / "c.mp4"), region=str(tmp_path / "m.mp4"))
  mask = lay_out(request, 8)[1]
  np.testing.assert_array_equal(mask[1:], ~hidden[2::2, ::8, ::8])
  assert mask[0].all()  # whatever is painted there
  with pytest.raises(BadInput, match=r"m.mp4 has 5 frames at 12 frames a second, 6 are wanted"):
    lay_out(replace(request, clip="", first=str(tmp_path / "c.mp4"), frames=6), 8)


@pytest.mark.parametrize("how", [None, "stretch", "crop", "pad"])
def test_every_fit_gives_the_size_and_keeps_flat_colour_flat(how):
  flat = np.full((2, 40, 60, 3), 77, np.uint8)
  result = given.fit(flat, 32, 48, how)
  assert result.shape == (2, 32, 48, 3) and (result == 77).all()


def test_fits_do_what_they_are_called():
  halves = np.zeros((1, 20, 80, 3), np.uint8)
  halves[:, :, 40:] = 200
  assert given.fit(halves, 20, 40, "stretch")[0, 10, [2, 37], 0].tolist() == [0, 200]
  wide = np.zeros((1, 20, 80, 3), np.uint8)
  wide[:, :, 20:60] = 200
  assert (given.fit(wide, 20, 40, "crop") == 200).all()
  padded = given.fit(np.full((1, 20, 80, 3), 200, np.uint8), 40, 80, "pad")[0, :, 0, 0]
  assert padded.tolist() == [0] * 10 + [200] * 20 + [0] * 10


def test_a_mask_fits_as_its_image_does_and_bars_count_as_given():
  mask = np.ones((1, 20, 80), bool)
  mask[:, :, 20:60] = False
  assert not given.fit_mask(mask, 20, 40, "crop").any()
  padded = given.fit_mask(mask, 40, 80, "pad")[0]
  assert padded[:10].all() and padded[30:].all() and not padded[10:30, 20:60].any() and padded[10:30, :20].all()


def write(path, data):
  path.write_bytes(data)
  return path


def half_an_mp4(folder):
  film.write_mp4(folder / "whole.mp4", smooth(), 8.0)
  return write(folder / "half.mp4", (folder / "whole.mp4").read_bytes()[:900])


def half_a_png(folder):
  data = png(folder / "whole.png", smooth(1)[0]).read_bytes()
  return write(folder / "half.png", data[:len(data) // 2])


def a_film(folder):
  film.write_mp4(folder / "a.mp4", smooth(), 8.0)
  return folder / "a.mp4"


MISTAKES = {
  "no image": (lambda d: given.read_image(d / "none.png"), "does not exist"),
  "a folder": (lambda d: given.read_image(d), "is not a file"),
  "text named png": (lambda d: given.read_image(write(d / "a.png", b"hello")), "is not an image: give a png or jpg"),
  "empty png": (lambda d: given.read_image(write(d / "a.png", b"")), "is not an image"),
  "half a png": (lambda d: given.read_image(half_a_png(d)), "is damaged"),
  "a film as image": (lambda d: given.read_image(a_film(d)), "is not an image"),
  "no film": (lambda d: given.read_film(d / "none.mp4"), "does not exist"),
  "text named mp4": (lambda d: given.read_film(write(d / "a.mp4", b"hello" * 99)), "cannot be read as a film"),
  "empty mp4": (lambda d: given.read_film(write(d / "a.mp4", b"")), "0 bytes"),
  "half an mp4": (lambda d: given.read_film(half_an_mp4(d)), "cannot be read as a film"),
  "a short film": (lambda d: given.read_film(a_film(d), count=8), "has 7 frames, 8 are wanted"),
  "a short end": (lambda d: given.read_film(a_film(d), fps=4.0, count=5, end=True), "has 4 frames at 4 frames"),
  "a white mask": (lambda d: given.read_mask(png(d / "m.png", np.full((8, 8), 255, np.uint8))), "hides no pixel"),
  "another aspect": (lambda d: given.fit(smooth(1, 48, 64), 32, 48, name="--first a.png"),
                     r"--first a.png is 64 x 48 \(aspect 1.333\).* 48 x 32 \(1.500\).* --fit crop"),
  "a wider aspect": (lambda d: given.fit(smooth(1, 32, 49), 32, 48, name="--last b.png"), "49 x 32 .*--fit crop"),
  "an unknown fit": (lambda d: given.fit(smooth(1), 32, 48, "strech"), "did you mean 'stretch'"),
}


@pytest.mark.parametrize(("act", "words"), MISTAKES.values(), ids=MISTAKES)
def test_each_wrong_input_is_told_in_one_line(tmp_path, act, words):
  with pytest.raises(BadInput, match=words) as refusal:
    act(tmp_path)
  assert "\n" not in str(refusal.value)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(BadInput, match="more than 1000 pixels"):
    given.read_image(png(tmp_path / "a.png", smooth(1, 40, 40)[0]))
