"""Shots begin and end where they do, whatever flashes, moves or stands still within; borders are found to the pixel."""

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import planted
import pytest
from curation import cut, frames, gradual, likeness, probe, transitions
from curation.items import Film

from anisora_jax import errors

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = cut.Settings(shortest=.5)


def look(path) -> Film:
  film = probe.probe(path, path.name, probe.Settings())
  assert isinstance(film, Film), film
  return film


def found_in(film: Film, settings=SETTINGS) -> list[gradual.Transition]:
  finder, made = transitions.Finder(film.fps, settings.content, settings.adaptive), []
  for number, small in frames.paced(film, height=cut.small_height(film)):
    made += finder.push(number, small)
  return made + list(finder.end())


def matched(truth: list, found: list) -> dict[str, list[int]]:
  """Hits, misses, false alarms of cuts, which must be exact, and of fades and dissolves, which must overlap by half."""
  tally, left = {"cut": [0, 0, 0], "fade": [0, 0, 0], "dissolve": [0, 0, 0]}, list(found)
  for kind, start, stop in truth:
    def hits(each, kind=kind, start=start, stop=stop):
      if kind == "cut" or each.kind == "cut":
        return kind == each.kind and each.start == each.stop == start
      overlap = min(stop, each.stop) - max(start, each.start)
      return overlap >= .5 * max(stop - start, each.stop - each.start)
    hit = next((each for each in left if hits(each)), None)
    tally[kind][0 if hit else 1] += 1
    if hit:
      left.remove(hit)
  for each in left:
    tally[each.kind][2] += 1
  return tally


@pytest.fixture(scope="module")
def reels(tmp_path_factory):
  """Twelve films of eight transitions each, with what their transitions are and what was found."""
  folder, made = tmp_path_factory.mktemp("reels"), []
  for seed in range(100, 112):
    reel = planted.reel(seed)
    film = look(reel.write(folder / f"{seed}.mp4", crf=(18, 23, 28)[seed % 3]))
    made.append((film, reel.truth, found_in(film)))
  return made


def test_every_hard_cut_is_found_to_the_frame_and_most_fades_and_dissolves_and_nothing_else(reels):
  total = {kind: np.sum([matched(truth, found)[kind] for _, truth, found in reels], axis=0)
           for kind in ("cut", "fade", "dissolve")}
  cuts, fades, dissolves = (total[kind] for kind in ("cut", "fade", "dissolve"))
  for film, truth, found in reels:
    if any(np.any(counts[1:]) for counts in matched(truth, found).values()):
      print(film.name, film.fps, truth, [(t.kind, t.start, t.stop) for t in found])
  print(f"hits, misses, false: cuts {cuts}, fades {fades}, dissolves {dissolves}")
  assert cuts[:2].sum() >= 40 and fades[:2].sum() >= 20 and dissolves[:2].sum() >= 20, "too few planted to tell"
  assert cuts[1] == cuts[2] == 0
  for hits, misses, false in (fades, dissolves):
    assert hits / (hits + misses) >= .9 and hits / (hits + false) >= .9


def test_flashes_impact_frames_shakes_and_whip_pans_are_no_cuts(tmp_path):
  scene, rng = planted.toon(3, 8), np.random.default_rng(0)
  reel = planted.Reel(24).play(scene, 1).flash(2).play(scene, 1, 1).negative(1).play(scene, 1, 2).flash(3, 0)
  reel.play(scene, 1, 3)
  for n in range(0, 12, 3):  # a strobe
    reel.frames[-n - 1] = 255 - reel.frames[-n - 1] // 4
  reel.play(scene, 1, 4)
  for n in range(1, 20):     # a shaking camera
    reel.frames[-n] = np.roll(reel.frames[-n], rng.integers(-9, 10, 2), (0, 1))
  whip = planted.clouds(5, 2.)
  reel.play(scene, 1, 5).cut().play(planted.on(whip, 3, 24), 1.5).play(planted.clouds(5, 2.), 1, 1.5)
  assert [t for t in found_in(look(reel.write(tmp_path / "a.mp4"))) if t.kind == "cut"] == [
    gradual.Transition("cut", 144, 144)]


def test_transitions_do_not_depend_on_where_windows_begin(tmp_path, monkeypatch):
  film = look(planted.reel(104).write(tmp_path / "a.mp4"))
  whole = found_in(film)
  for core in (5., 7.3):
    monkeypatch.setattr(transitions, "CORE", core)
    assert [(t.kind, t.start, t.stop) for t in found_in(film)] == [(t.kind, t.start, t.stop) for t in whole]


def test_stills_are_trimmed_animation_on_threes_is_kept_and_a_still_shot_is_refused(tmp_path):
  moving, still = planted.toon(1), planted.toon(2)
  reel = planted.Reel(24)
  reel.frames = [moving(0)] * 30
  reel.play(planted.on(moving, 3, 24), 2)
  reel.frames += [reel.frames[-1]] * 40
  reel.frames += [still(0)] * 60
  film = look(reel.write(tmp_path / "a.mp4"))
  shots, rejected, count = cut.cut(film, SETTINGS)
  (shot,) = shots
  # The film stands for 30 frames and the first drawing's own 3, moves until 75, and holds the last drawing.
  assert count == 178 and shot.opens == "start" and abs(shot.start - 32) <= 1 and abs(shot.stop - 76) <= 1
  (refused,) = rejected
  assert refused.reason == "static" and 118 <= int(refused.what[-6:]) < 178


def test_shots_are_divided_evenly_or_refused_by_their_length(tmp_path):
  scene = planted.toon(4, 10)
  reel = planted.Reel(12).play(scene, 7).cut().play(planted.blocks(1), 1.2).cut().play(planted.clouds(2, .2), 2)
  film = look(reel.write(tmp_path / "a.mp4"))
  shots, rejected, count = cut.cut(film, cut.Settings(shortest=1.5, longest=3))
  assert [(s.opens, s.start, s.stop) for s in shots] == [("start", 0, 28), ("split", 28, 56), ("split", 56, 84),
                                                         ("cut", 98, 122)]
  assert [(r.what, r.reason, r.stage) for r in rejected] == [("a.mp4/000084", "too_short", "cut")] and count == 122


def test_shots_hold_no_frame_of_a_transition_and_none_twice(reels):
  for film, _, found in reels[:3]:
    shots, _, count = cut.cut(film, cut.Settings(shortest=.1, longest=1.2))
    taken = np.zeros(count, int)
    for shot in shots:
      taken[shot.start:shot.stop] += 1
      assert not any(shot.start < each.start < shot.stop for each in found), (film.name, shot)
    assert count == film.frames and taken.max() == 1 and taken.mean() > .6, film.name
    for each in found:
      assert not taken[each.start:each.stop].any(), (film.name, each)


BORDERS = {"none": (0, 0, 0, 0), "letterbox": (60, 60, 0, 0), "pillarbox": (0, 0, 80, 80), "window": (30, 30, 40, 40),
           "uneven": (44, 52, 0, 0), "thin": (6, 4, 0, 0), "odd": (31, 33, 5, 3)}


@pytest.mark.parametrize("name", BORDERS)
def test_borders_are_found_within_two_pixels(tmp_path, name):
  top, bottom, left, right = BORDERS[name]
  reel, height, width = planted.Reel(12), 480, 640
  reel.play(planted.toon(5), 2).cut().play(planted.clouds(6, .2, bright=.5), 2).cut().play(planted.toon(7), 2)
  made = np.zeros((len(reel.frames), height, width, 3), np.uint8)
  for n, picture in enumerate(reel.frames):
    inner = made[n, top:height - bottom, left:width - right]
    inner[:] = cv2.resize(picture, inner.shape[1::-1])
  planted.write(tmp_path / "a.mp4", made, 12, crf=26)
  shots = cut.cut(look(tmp_path / "a.mp4"), cut.Settings(shortest=1))[0]
  assert len(shots) == 3
  for shot in shots:
    y, x, rows, columns = shot.box
    ends = np.array([y, height - y - rows, x, width - x - columns])
    assert np.abs(ends - BORDERS[name]).max() <= 2 and rows % 2 == columns % 2 == 0, (name, shot.box)


def dark(seed: int, height: int, width: int) -> np.ndarray:
  """A night: a strip of hills that are just visible between a black sky and black ground, and a lamp."""
  rng, across = np.random.default_rng(seed), np.arange(width)
  waves = .1 * np.sin(across / 40 + seed) + .05 * np.sin(across / 9)
  rows = np.arange(height)[:, None] / height
  night = np.where((rows > .25 + waves) & (rows < .75 - waves), 40, 1).astype(np.uint8)
  night = np.stack([night // 2, night // 2, night], -1) + rng.integers(0, 2, (height, width, 1), dtype=np.uint8)
  cv2.circle(night, (width // 3 + 4 * seed, height // 2), 12, (200, 190, 140), -1)
  return night


def test_a_dark_scene_is_not_cropped_but_for_the_borders_of_its_film(tmp_path):
  def box_of_last(pictures):
    planted.write(tmp_path / "a.mp4", np.stack(pictures), 12)
    return cut.cut(look(tmp_path / "a.mp4"), cut.Settings(shortest=1))[0][-1].box
  night = [dark(n, 240, 320) for n in range(30)]
  assert box_of_last(night) == (0, 0, 240, 320)
  scene = planted.toon(8)
  boxed = [np.pad(cv2.resize(scene(n / 12), (320, 180)), ((30, 30), (0, 0), (0, 0))) for n in range(60)]
  boxed += [np.pad(dark(n, 180, 320), ((30, 30), (0, 0), (0, 0))) for n in range(30)]
  top, left, rows, columns = box_of_last(boxed)
  assert abs(top - 30) <= 2 and abs(rows - 180) <= 3 and (left, columns) == (0, 320)


def test_memory_is_that_of_a_window_and_not_of_the_film(tmp_path):
  def peak(seconds):
    path = planted.Reel(6).play(planted.blocks(3), seconds).write(tmp_path / f"{seconds}.mp4")
    film = look(path)
    tracemalloc.start()
    cut.cut(film, SETTINGS)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return used
  peak(20)  # what is made once
  short, long = peak(45), peak(135)
  assert long < 1.1 * short, (short, long)


def test_of_a_picture_that_stands_for_minutes_a_window_is_held_and_the_cut_behind_it_is_found():
  still, other = (np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8) for seed in (1, 2))
  finder, made = transitions.Finder(6., SETTINGS.content, SETTINGS.adaptive), []
  for number in range(900):
    made += finder.push(number, other if 600 <= number < 620 else still)
    assert len(finder.held) <= 6 * (transitions.CORE + 2 * transitions.MARGIN)
  assert [(t.kind, t.start) for t in made + list(finder.end())] == [("cut", 600), ("cut", 620)]


def test_a_small_and_an_upright_film_are_cut_too(tmp_path):
  made = planted.Reel(12).play(planted.toon(1), 2).cut().play(planted.toon(9), 2)
  for name, size in (("small", (48, 32)), ("upright", (64, 160))):
    planted.write(tmp_path / f"{name}.mp4", np.stack([cv2.resize(each, size) for each in made.frames]), 12)
    assert [s.start for s in cut.cut(look(tmp_path / f"{name}.mp4"), SETTINGS)[0]] == [0, 24], name


def test_the_real_film_is_one_shot():
  path = ROOT.parent / "shared/clips/bigbuckbunny.mp4"
  if not path.exists():
    pytest.skip("the film is not here")
  shots, rejected, count = cut.cut(look(path), cut.Settings())
  assert [(s.start, s.stop, s.box) for s in shots] == [(0, 132, (0, 0, 720, 1280))] and not rejected and count == 132


def test_likeness_sees_through_motion_and_light_but_not_through_scenes():
  scene, other = planted.toon(3), planted.toon(4)
  a, moved = scene(1), scene(1.1)
  assert likeness.unexplained(a, moved) < .3 < likeness.OTHER < likeness.unexplained(a, other(1))
  assert likeness.unexplained(a, (moved * .6).astype(np.uint8)) < .4
  assert likeness.unexplained(a, np.full_like(a, 255)) > likeness.OTHER
  assert likeness.palette(a, a) == pytest.approx(1) and likeness.palette(a, 255 - a) < .3


def test_likeness_does_not_depend_on_what_was_compared_before():
  a, b = planted.toon(3)(1), planted.toon(3)(1.4)
  before = likeness.moved(a, b)
  likeness.unexplained(*np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8))
  np.testing.assert_array_equal(likeness.moved(a, b), before)


def test_settings_say_what_is_allowed():
  with pytest.raises(errors.BadInput, match=r"cut.longest is 3.*at least twice the shortest"):
    cut.Settings(shortest=2, longest=3)
  with pytest.raises(errors.BadInput, match=r"cut.black is 99: allowed are 1 to 64"):
    cut.Settings(black=99)
