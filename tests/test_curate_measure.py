"""What is measured of a shot is what was drawn: its motion, its camera, its text, how sharp and how flat it is."""

import itertools

import cartoon
import cv2
import numpy as np
import pytest
import toons
from curation import motion
from scipy.stats import spearmanr

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
  for measure in (motion.length, motion.largest, motion.top_lengths):
    assert measure(larger) == pytest.approx(measure(moved), rel=1e-5)  # the size of the pictures does not matter


def camera_of(film: np.ndarray) -> str:
  pairs = [[motion.small(film[k + apart], motion.FINE_WIDTH) for apart in (0, 3)] for k in range(2, len(film) - 3, 5)]
  return motion.camera([motion.camera_step(*pair) for pair in pairs], 3 / FPS, .02)


@pytest.mark.parametrize("camera", motion.CAMERAS[1:])
def test_the_camera_is_told_from_one_picture_that_it_moves_over(camera):
  for seed, speed in enumerate((.05, .15, .4)):
    assert camera_of(filmed(still(seed), camera, max(speed, .15 * (camera == "other")), 40)) == camera


@pytest.mark.parametrize("seed", range(10))
def test_a_standing_camera_is_told_behind_moving_characters_and_a_pan_by_layers_that_slide_apart(seed):
  shot = a_shot(seed)
  pan, shot.pan = shot.pan, 0
  assert camera_of(drawn(shot, 40)) == "static"
  shot.pan = pan
  assert camera_of(drawn(shot, 40)) == ("pan right" if pan > 0 else "pan left")


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
