"""How much a shot moves, by three definitions kept apart, and what its camera does. All by optical flow (DIS).

  motion             ours, `records.Clip.motion`: mean length of the flow between neighbouring frames, in widths of the
                     picture per frame; times the frame rate, in widths per second. 0 stands still; a pan at .2 widths
                     a second crosses the picture in 5 s. A drawing held for two frames counts as it is shown.
  anisora_dis        AniSora's: mean over neighbouring frames of the largest |component| of the flow, in pixels of a
                     picture 480 high. There the flow is RAFT's at that height; here it is DIS's on small pictures,
                     scaled, so its numbers rank clips and are not to be mixed with AniSora's.
  vbench_dis         VBench's dynamic degree: between frames 1/8 s apart, mean length of the largest 5 % of the flow, in
                     256ths of the picture's shorter side. VBench, by RAFT, calls a pair moving above 6, and a clip
                     where a quarter of its pairs are.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from anisora_jax.loaders import video

WIDTH = 128         # of the pictures for `motion` and AniSora's
FINE_WIDTH = 192    # of those for VBench's and the camera
FEWEST_ROWS = 32    # with less, DIS (OpenCV 5.0) writes where it must not and ends the process
RUN = 6             # pairs of neighbouring frames looked at together: a multiple of 2 and of 3
RUNS = 3            # for `motion` of frames in memory
CAMERAS = ("static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll", "other")

Grey = UInt8[np.ndarray, "h w"]
Flow = Float[np.ndarray, "h w 2"]
STILL = .3          # pixels of the fine pictures by which what stands may seem to move
GRID = (6, 10)      # cells, down and across, that share the picture when corners are counted


def runs(count: int, wanted: int) -> list[range]:
  """At most `wanted` runs of neighbouring frames of 0 .. count - 1, evenly spread, each of RUN pairs; or all frames.

  Animation holds a drawing for two or three frames. Any RUN pairs in a row see as many changes as the film has, where
  single pairs, evenly spaced, can fall in with them and see all or none.
  """
  pairs = count - 1
  if pairs <= wanted * RUN:
    return [range(count)] if pairs > 0 else []
  starts = [int((k + .5) * pairs / wanted - RUN / 2) for k in range(wanted)]
  return [range(start, start + RUN + 1) for start in starts]


def _at_width(picture: np.ndarray, width: int) -> np.ndarray:
  rows = max(1, round(picture.shape[0] * width / picture.shape[1]))
  return cv2.resize(picture, (width, rows),
                    interpolation=cv2.INTER_AREA if picture.shape[1] >= width else cv2.INTER_LINEAR)


def small(picture: UInt8[np.ndarray, "H W 3"], width: int) -> Grey:
  """A grey picture of a given width, its shape kept."""
  return cv2.cvtColor(_at_width(picture, width), cv2.COLOR_RGB2GRAY)


def narrow(grey: Grey) -> Grey:
  """A fine picture at the width for `motion`."""
  return _at_width(grey, WIDTH)


def flow(first: Grey, second: Grey) -> Flow:
  """Where every pixel of the first picture went, (right, down) in pixels."""
  rows = first.shape[0]
  if rows < FEWEST_ROWS:
    first, second = (cv2.copyMakeBorder(grey, 0, FEWEST_ROWS - rows, 0, 0, cv2.BORDER_REPLICATE)
                     for grey in (first, second))
  return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(first, second, None)[:rows]


def _lengths(moved: Flow) -> Float[np.ndarray, "h w"]:
  return cv2.magnitude(*cv2.split(moved))


def length(moved: Flow) -> float:
  """Mean length of a flow in widths of the picture."""
  return float(cv2.mean(_lengths(moved))[0]) / moved.shape[1]


def largest(moved: Flow) -> float:
  """Largest |component| of a flow, in pixels at height 480."""
  return float(np.abs(moved).max()) * 480 / moved.shape[0]


def top_lengths(moved: Flow) -> float:
  """Mean of the largest 5 % of lengths, in 256ths of the picture's shorter side.

  From: VBench, dynamic_degree.py: int(.05 H W) largest, against 6 min(H, W) / 256.
  """
  lengths = _lengths(moved).ravel()
  count = max(1, int(.05 * lengths.size))
  return float(np.partition(lengths, -count)[-count:].mean()) * 256 / min(moved.shape[:2])


def motion(frames: video.Frames) -> float:
  """Mean length of the optical flow (DIS, on small grey pictures) in widths of the picture per frame."""
  lengths = []
  for run in runs(len(frames), RUNS):
    pictures = [small(frames[k], WIDTH) for k in run]
    lengths += [length(flow(*pair)) for pair in itertools.pairwise(pictures)]
  return round(float(np.mean(lengths)), 5) if lengths else 0.


class Step(NamedTuple):
  """What the camera did between two pictures, in widths of the picture: how far its content went right and down, how
  far a point half a width from the middle went outward and around. share: of the corners that say so, by area."""
  right: float
  down: float
  outward: float
  around: float
  share: float


STANDS = Step(0., 0., 0., 0., 1.)


def _tracks(first: Grey, second: Grey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Corners [n, 2] spread over the first picture, how far each went [n, 2], and the weight of each [n].

  Every cell of a grid that has corners weighs the same, so that a character rich in lines counts by its area. What is
  not found again on the way back is left out.
  """
  height, width = first.shape
  corners = cv2.goodFeaturesToTrack(first, 400, .005, max(3., width / 50))
  if corners is None:
    return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0)
  window = dict(winSize=(11, 11), maxLevel=3)
  there, found, _ = cv2.calcOpticalFlowPyrLK(first, second, corners, None, **window)
  back, again, _ = cv2.calcOpticalFlowPyrLK(second, first, there, None, **window)
  sure = (found[:, 0] > 0) & (again[:, 0] > 0) & (np.linalg.norm((back - corners)[:, 0], axis=1) < .5)
  points, moved = corners[sure, 0], (there - corners)[sure, 0]
  cells = (points * (GRID[1] / width, GRID[0] / height)).astype(int) @ (1, GRID[1])
  _, cell, crowd = np.unique(cells, return_inverse=True, return_counts=True)
  return points, moved, 1 / crowd[cell] / len(crowd)


def _median(values: np.ndarray, weights: np.ndarray) -> float:
  order = np.argsort(values)
  total = np.cumsum(weights[order])
  return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _fit(points: np.ndarray, moved: np.ndarray, weights: np.ndarray, shape: tuple[int, int]) -> Step | None:
  """Shift, zoom and roll that the corners have in common (RANSAC); None if less than half of the area goes along."""
  height, width = shape
  cv2.setRNGSeed(0)
  fit, kept = cv2.estimateAffinePartial2D(points, points + moved, method=cv2.RANSAC, maxIters=1000, confidence=.999,
                                          ransacReprojThreshold=.008 * height)
  if fit is None or (share := float(weights @ kept[:, 0])) < .5:
    return None
  middle = np.array([width - 1, height - 1]) / 2
  right, down = (fit[:, :2] @ middle + fit[:, 2] - middle) / width
  scale, angle = np.hypot(fit[0, 0], fit[1, 0]), np.arctan2(fit[1, 0], fit[0, 0])
  return Step(float(right), float(down), float(np.log(scale)) / 2, float(angle) / 2, share)


def _slide(moved: np.ndarray, weights: np.ndarray, width: int) -> Step:
  """The common direction of layers that slide at different speeds (parallax): their mean shift."""
  moves = np.linalg.norm(moved, axis=1) >= STILL
  way = np.array([_median(moved[moves, k], weights[moves]) for k in range(2)])
  way /= max(np.linalg.norm(way), 1e-9)
  along, across = moved @ way, np.abs(moved @ (-way[1], way[0]))
  agrees = (along > STILL / 2) & (across < STILL + .2 * along)
  share = float(weights[agrees].sum())
  right, down = weights[agrees] @ moved[agrees] / max(share, 1e-9) / width
  return Step(float(right), float(down), 0., 0., share)


def camera_step(first: Grey, second: Grey) -> Step | None:
  """What the camera did between two pictures; None where they have too few corners to tell.

  A camera stands where .4 of the picture's corners, by area, stay where they were: a character who walks before a
  standing background rarely takes more of it. Else most of the area shares one shift, zoom and roll, or at least a
  direction.
  """
  points, moved, weights = _tracks(first, second)
  if len(points) < 8:
    return None
  if weights[np.linalg.norm(moved, axis=1) < STILL].sum() >= .4:
    return STANDS
  return _fit(points, moved, weights, first.shape) or _slide(moved, weights, first.shape[1])


def _speeds(steps: Sequence[Step | None], seconds: float) -> np.ndarray:
  """Widths a second (right, down, outward, around) of the steps that most of the picture agrees on, [n, 4]."""
  return np.array([step[:4] for step in steps if step is not None and step.share >= .4]).reshape(-1, 4) / seconds


def camera_speed(steps: Sequence[Step | None], seconds: float) -> float:
  """How fast the picture moves as a whole, in widths a second; 0 where nothing tells."""
  speeds = _speeds(steps, seconds)
  return float(np.median(np.abs(speeds), axis=0).max()) if len(speeds) else 0.


def camera(steps: Sequence[Step | None], seconds: float, slowest: float) -> str:
  """The word of CAMERAS for what a shot's camera does, in AniSora's words where it has one ("tilt up").

  seconds: between the two pictures of a step. slowest: widths per second below which the camera stands. A camera
  that pans right sends the picture left. "other" is one that moves in no one way (shaken, turning back, two ways at
  once) or whose motion nothing in the picture agrees on; it is no phrase for a caption.
  """
  told, speeds = sum(step is not None for step in steps), _speeds(steps, seconds)
  if not told:
    return "static"
  if 2 * len(speeds) < told:
    return "other"
  steady, amount = np.median(speeds, axis=0), np.median(np.abs(speeds), axis=0)
  if amount.max() < slowest:
    return "static"
  ways = (("pan left", "pan right"), ("tilt up", "tilt down"), ("zoom in", "zoom out"), ("roll", "roll"))
  second, first = np.argsort(np.abs(steady))[-2:]
  if abs(steady[first]) < .6 * amount.max() or abs(steady[second]) > .6 * abs(steady[first]):
    return "other"
  return ways[first][int(steady[first] < 0)]
