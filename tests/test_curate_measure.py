"""What is measured of a shot is what was drawn: its motion, its camera, and all of it in one pass over a film."""

import itertools
import json
from pathlib import Path

import cartoon
import cv2
import numpy as np
import pytest
import toons
from curation import frames, measure, motion, probe
from curation.items import Film, Shot
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr

from anisora_jax.loaders import video

HEIGHT, WIDTH, FPS = 240, 416, 24


def a_shot(seed: int, seconds: float = 2) -> toons.Shot:
  rng = np.random.default_rng(seed)
  return toons.plan_shot(rng, str(rng.choice(list(cartoon.PLACES))), seconds, 100 * WIDTH / HEIGHT)


def drawn(shot: toons.Shot, frames: int) -> np.ndarray:
  return np.stack([toons.draw_frame(shot, number / FPS, HEIGHT, WIDTH)[0] for number in range(frames)])


def still(seed: int, scale: float = 1.6) -> np.ndarray:
  """One cartoon picture, larger than a frame by `scale`."""
  return toons.draw_frame(a_shot(seed), 1., round(HEIGHT * scale), round(WIDTH * scale))[0]


def filmed(picture: np.ndarray, camera: str, speed: float, frames: int) -> np.ndarray:
  """A camera that moves over a picture. speed: widths a second; of zoom and roll, of a point half a width out."""
  height, width = picture.shape[:2]
  out = []
  for number in range(frames):
    gone = (number - frames / 2) / FPS * speed
    right, down = {"pan right": (-gone, 0), "pan left": (gone, 0), "tilt up": (0, gone), "tilt down": (0, -gone),
                   "other": (.1 * speed * np.sin(1.9 * number), .1 * speed * np.cos(2.3 * number))}.get(camera, (0, 0))
    scale = np.exp(2 * gone * {"zoom in": 1, "zoom out": -1}.get(camera, 0))
    angle = 2 * gone * (camera == "roll")
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = np.array([WIDTH / 2 + right * WIDTH, HEIGHT / 2 + down * WIDTH]) - turn @ (width / 2, height / 2)
    out.append(cv2.warpAffine(picture, np.column_stack([turn, shift]), (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT))
  return np.stack(out)


def rolling_balls(seed: int) -> tuple[list[float], list[float]]:
  """True and measured motion of a ball that rolls over a standing cartoon, at five speeds."""
  rng, back = np.random.default_rng(seed), still(seed, 1)
  true, measured = [], []
  for speed in (.002, .005, .01, .02, .04):
    radius, film = rng.uniform(.1, .25) * HEIGHT, []
    for number in range(10):
      x, y = int(WIDTH * (.2 + speed * number)), int(HEIGHT * .55)
      film.append(back.copy())
      cv2.circle(film[-1], (x, y), int(radius), (230, 60, 50), -1, cv2.LINE_AA)
      cv2.circle(film[-1], (x, y), int(radius), (20, 20, 20), 3, cv2.LINE_AA)
      cv2.circle(film[-1], (x + int(radius / 3), y - int(radius / 3)), int(radius / 5), (250, 250, 250), -1)
    true.append(speed * np.pi * radius**2 / (HEIGHT * WIDTH))
    measured.append(motion.motion(np.stack(film)))
  return true, measured


def test_motion_is_the_shift_of_a_sliding_picture():
  picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 400, 3), dtype=np.uint8), (0, 0), 3)
  sliding = np.stack([picture[:, 3 * k:3 * k + 192] for k in range(9)])
  assert motion.motion(sliding) == pytest.approx(3 / 192, rel=.15)
  assert motion.motion(np.repeat(sliding[:1], 4, 0)) < 1e-4
  assert motion.motion(sliding[:1]) == 0


def test_motion_rises_with_the_speed_of_a_camera_and_of_a_character():
  speeds = np.geomspace(.0005, .08, 16)
  pans = [motion.motion(filmed(still(k % 5, 2), "pan right", speed * FPS, 10)) for k, speed in enumerate(speeds)]
  assert spearmanr(speeds, pans).statistic >= .95
  balls = np.concatenate([rolling_balls(seed) for seed in range(4)], axis=1)
  assert spearmanr(*balls).statistic >= .95


@pytest.mark.parametrize("held", [2, 3])
@pytest.mark.parametrize("frames", [45, 58, 73])
def test_motion_of_drawings_held_on_twos_and_threes_is_that_of_the_film(held, frames):
  slid = filmed(still(1, 2), "pan right", .02 * FPS, frames)[np.arange(frames) // held * held]
  assert motion.motion(slid) == pytest.approx(.02, rel=.15)


def test_the_three_definitions_of_motion_are_what_their_papers_say():
  rng = np.random.default_rng(0)
  moved = rng.normal(0, 3, (120, 160, 2)).astype(np.float32)
  x, y = moved[..., 0].astype(float), moved[..., 1].astype(float)
  lengths = np.sort(np.sqrt(x**2 + y**2).ravel())[::-1]
  assert motion.length(moved) == pytest.approx(lengths.mean() / 160, rel=1e-5)
  assert motion.largest(moved) == pytest.approx(max(abs(x).max(), abs(y).max()) * 4, rel=1e-5)
  # VBench compares the mean of the top 5 % with 6 min(H, W) / 256.
  assert motion.top_lengths(moved) / 6 == pytest.approx(lengths[:960].mean() / (6 * 120 / 256), rel=1e-5)
  larger = cv2.resize(moved, (320, 240), interpolation=cv2.INTER_NEAREST) * 2
  for amount in (motion.length, motion.largest, motion.top_lengths):
    assert amount(larger) == pytest.approx(amount(moved), rel=1e-5)  # the size of the pictures does not matter


def camera_of(film: np.ndarray) -> str:
  pairs = [[motion.small(film[k + apart], motion.FINE_WIDTH) for apart in (0, 3)] for k in range(2, len(film) - 3, 5)]
  return motion.camera([motion.camera_step(*pair) for pair in pairs], 3 / FPS, .02)


@pytest.mark.parametrize("camera", motion.CAMERAS[1:])
def test_the_camera_is_told_from_one_picture_that_it_moves_over(camera):
  for seed, speed in enumerate((.05, .15, .4)):
    assert camera_of(filmed(still(seed), camera, max(speed, .15 * (camera == "other")), 40)) == camera


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 21, 40, 69, 87])
def test_a_standing_camera_is_told_behind_moving_characters(seed):
  shot = a_shot(seed)
  shot.pan = 0
  assert camera_of(drawn(shot, 40)) == "static"


@pytest.mark.parametrize("seed", range(8))
def test_a_pan_is_told_from_layers_that_slide_apart(seed):
  shot = a_shot(seed)
  assert camera_of(drawn(shot, 40)) == ("pan right" if shot.pan > 0 else "pan left")


def test_a_camera_slower_than_asked_stands_and_a_blank_picture_shows_none():
  assert camera_of(filmed(still(0), "pan left", .01, 40)) == "static"
  assert camera_of(np.full((12, 64, 64, 3), 200, np.uint8)) == "static"


def test_runs_are_spread_over_all_frames_and_never_share_a_pair():
  assert motion.runs(0, 3) == motion.runs(1, 3) == [] and motion.runs(19, 3) == [range(19)]
  for count in range(20, 300):
    runs = motion.runs(count, 3)
    assert [len(run) for run in runs] == [7] * 3 and runs[0][0] >= 0 and runs[-1][-1] < count
    middles = [0, *((run[0] + run[-1]) / 2 for run in runs), count - 1]
    assert np.diff(middles) == pytest.approx(np.array([1, 2, 2, 1]) * (count - 1) / 6, abs=1.01)
    assert all(one[-1] <= other[0] for one, other in itertools.pairwise(runs))


@pytest.mark.parametrize(("height", "width"), [(1, 832), (9, 300), (30, 240), (240, 30)])
def test_strips_have_motion_too(height, width):
  """OpenCV's flow ends the process where a picture has fewer than 32 rows."""
  noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (height, 3 * width, 3), dtype=np.uint8), (0, 0), 4)
  noise = cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX)
  strip = np.stack([noise[:, round(.02 * width * k):][:, :width] for k in range(9)])
  assert motion.motion(strip) == pytest.approx(.02, rel=.4 if height >= 30 else 2)


# Whole shots of films

def film_of(folder: Path, pictures: np.ndarray, name: str = "film.mp4") -> tuple[Film, Shot]:
  (folder / name).write_bytes(video.encode(pictures, float(FPS)))
  film = probe.probe(folder / name, name, probe.Settings())
  return film, Shot(name, 0, len(pictures), (0, 0, *pictures.shape[1:3]))


@pytest.fixture(scope="module")
def pan(tmp_path_factory) -> tuple[Film, Shot, np.ndarray]:
  pictures = filmed(still(2), "pan left", .2, 60)
  return *film_of(tmp_path_factory.mktemp("pan"), pictures), pictures


def test_a_shot_has_every_measure_and_they_are_those_of_its_frames(pan):
  film, shot, pictures = pan
  found = measure.measure(film, shot, measure.Settings())
  assert set(found) == set(measure.Settings().names())
  assert found["camera"] == "pan left" and found["camera_speed"] == pytest.approx(.2, rel=.1)
  assert found["motion"] == pytest.approx(motion.motion(pictures), rel=.15)
  assert found["motion_per_second"] == pytest.approx(FPS * found["motion"], rel=.01)
  assert found["brightness"] == pytest.approx(pictures[10:50].mean() / 255, abs=.05)
  assert found["text_area"] == 0
  assert json.loads(json.dumps(found)) == found == measure.measure(film, shot, measure.Settings())


def test_motion_of_shots_rises_with_their_true_motion(tmp_path):
  speeds = np.random.default_rng(0).permutation(np.geomspace(.01, 1.5, 12))
  film, _ = film_of(tmp_path, np.concatenate([filmed(still(k % 4, 2), ("pan right", "tilt up")[k % 2], speed, 16)
                                              for k, speed in enumerate(speeds)]))
  box, settings = (0, 0, HEIGHT, WIDTH), measure.Settings(text_detector="none")
  found = [measure.measure(film, Shot(film.name, 16 * k, 16 * (k + 1), box), settings) for k in range(len(speeds))]
  assert spearmanr(speeds, [one["motion_per_second"] for one in found]).statistic >= .95


def test_what_lies_outside_the_box_is_not_measured(pan, tmp_path):
  _, _, pictures = pan
  page, font = Image.new("RGB", (WIDTH, HEIGHT + 80)), ImageFont.load_default(30)
  ImageDraw.Draw(page).text((WIDTH / 2, HEIGHT + 60), "Wait for me at the river", "white", font, "ms")
  framed = np.repeat(np.asarray(page)[None], len(pictures), 0)
  framed[:, 20:20 + HEIGHT] = pictures
  film, whole = film_of(tmp_path, framed)
  inner = Shot(film.name, 0, 60, (20, 0, HEIGHT, WIDTH))
  settings = measure.Settings(height=240)
  inside, bare = measure.measure(film, inner, settings), measure.measure(*pan[:2], settings)
  assert inside["text_area"] == 0 < .02 < measure.measure(film, whole, settings)["text_area"]
  for name in ("brightness", "contrast", "saturation", "motion", "camera_speed", "flatness"):
    assert inside[name] == pytest.approx(bare[name], rel=.06), name


def test_text_counts_by_the_time_it_stands(tmp_path):
  pictures = np.repeat(still(4, 1)[None], 8 * FPS, 0)
  subtitled, font = Image.fromarray(pictures[0]), ImageFont.load_default(22)
  ImageDraw.Draw(subtitled).text((WIDTH / 2, 225), "Original story and screenplay", "white", font, "ms",
                                 stroke_width=2, stroke_fill="black")
  always = pictures.copy()
  always[:] = np.asarray(subtitled)
  pictures[:4 * FPS] = always[0]
  settings = measure.Settings(text_seconds=2)
  half, full = (measure.measure(*film_of(tmp_path, seen), settings)["text_area"] for seen in (pictures, always))
  assert full > .04 and half == pytest.approx(full / 2, rel=.05)


def test_a_shot_is_read_once_and_few_of_its_frames_are_held(pan, monkeypatch):
  film, shot, _ = pan
  reads, held, read = [], [], frames.pictures
  monkeypatch.setattr(frames, "pictures", lambda *where: reads.append(where) or read(*where))
  add = measure._Moves.add
  monkeypatch.setattr(measure._Moves, "add", lambda moves, *seen: (add(moves, *seen), held.append(len(moves.held))))
  measure.measure(film, shot, measure.Settings(text_detector="none"))
  assert len(reads) == 1 and max(held) <= 4
  for seconds in (10, 1000):
    moves = measure._Moves(film, Shot("long", 0, seconds * FPS, (0, 0, HEIGHT, WIDTH)))
    assert len(moves.wanted) <= measure.MOST_RUNS * (motion.RUN + 1)


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (HEIGHT - 1, 0, 1, WIDTH), (0, WIDTH - 1, HEIGHT, 1), (100, 200, 2, 90)])
def test_boxes_of_a_few_pixels_are_measured(pan, box):
  film, _, _ = pan
  assert set(measure.measure(film, Shot(film.name, 0, 9, box), measure.Settings())) == set(measure.Settings().names())


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_shots_of_a_few_frames_have_what_can_be_measured(pan, length):
  film, _, _ = pan
  found = measure.measure(film, Shot(film.name, 30, 30 + length, (0, 0, HEIGHT, WIDTH)), measure.Settings())
  assert ("motion" in found) == (length > 1) and ("camera" in found) == (length > 3)
  assert found["sharpness"] > 0
