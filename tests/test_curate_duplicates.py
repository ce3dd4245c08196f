"""Every planted copy is found, no two of 500 distinct drawn clips are taken for one, and copies stay on one side."""

import itertools
import random

import cartoon
import cv2
import numpy as np
import pack
import pytest
import toons
from curation import duplicates
from curation.items import Candidate, Film, Shot

from anisora_jax.loaders import video

HEIGHT, WIDTH, SECONDS, FPS = 64, 96, 3, 12.
DISTINCT, COPIED = 500, 20


def _shots() -> list[toons.Shot]:
  """Distinct shots. Of every five the second has the scenery and the camera of the first and other characters, the
  third the characters of the first before other scenery."""
  shots = []
  for seed in range(DISTINCT):
    rng = np.random.default_rng(seed)
    shot = toons.plan_shot(rng, str(rng.choice(list(cartoon.PLACES))), SECONDS, 100 * WIDTH / HEIGHT)
    if seed % 5 == 1:
      shot = toons.Shot(shots[-1].scene, shots[-1].pan, shot.characters, shot.caption)
    if seed % 5 == 2:
      shot = toons.Shot(shot.scene, shot.pan, shots[-2].characters, shot.caption)
    shots.append(shot)
  return shots


def _draw(shot: toons.Shot, fps: float, seconds: float = SECONDS) -> np.ndarray:
  return np.stack([toons.draw_frame(shot, number / fps, HEIGHT, WIDTH)[0] for number in range(round(seconds * fps))])


def _prints(film: np.ndarray, fps: float = FPS) -> tuple[int, ...]:
  return duplicates.prints_of(enumerate(film), fps, len(film))


def _encoded(film: np.ndarray, crf: int) -> np.ndarray:
  even = film[:, :film.shape[1] // 2 * 2, :film.shape[2] // 2 * 2]
  return video.frames(video.encode(np.ascontiguousarray(even), FPS, crf), np.arange(len(film)))


def _scaled(film: np.ndarray, height: int, width: int) -> np.ndarray:
  return np.stack([cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in film])


def _cropped(film: np.ndarray, top: float, left: float, bottom: float, right: float) -> np.ndarray:
  """Cuts shares of the height and width off the sides."""
  h, w = film.shape[1:3]
  return film[:, round(top * h):h - round(bottom * h), round(left * w):w - round(right * w)]


def _marked(film: np.ndarray, size: float = .12, opaque: float = .6, middle: bool = False) -> np.ndarray:
  """Lays white letters, `size` of the height tall, into a corner or over the middle."""
  h, w = film.shape[1:3]
  scale, mark = h * size / 22, np.zeros((h, w), np.uint8)
  (wide, tall), _ = cv2.getTextSize("STUDIO", cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
  at = ((w - wide) // 2, (h + tall) // 2) if middle else (w - wide - 4, h - 6)
  cv2.putText(mark, "STUDIO", at, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
  share = mark[..., None] / 255 * opaque
  return (film * (1 - share) + 255 * share).astype(np.uint8)


def _shifted(film: np.ndarray, times: float, plus: float) -> np.ndarray:
  return np.clip(film.astype(float) * times + plus, 0, 255).astype(np.uint8)


def _anyhow(film: np.ndarray, seed: int) -> np.ndarray:
  """All at once, with a crop of its own of up to 5 % on every side."""
  crop = np.random.default_rng(seed).uniform(0, .05, 4)
  return _encoded(_scaled(_shifted(_marked(_cropped(film, *crop)), .85, 15), 48, 72), 30)


CHANGES = {
  "encoded": lambda film, seed: _encoded(film, 35),
  "scaled": lambda film, seed: _encoded(_scaled(film, 40, 60), 28),
  "stretched": lambda film, seed: _scaled(film, 36, 66),
  "enlarged": lambda film, seed: _scaled(film, 160, 240),
  "cropped 5 % on all sides": lambda film, seed: _cropped(film, .05, .05, .05, .05),
  "cropped 5 % at the top left": lambda film, seed: _cropped(film, .05, .05, 0, 0),
  "cropped 5 % in all": lambda film, seed: _cropped(film, .025, .025, .025, .025),
  "cropped anyhow": lambda film, seed: _cropped(film, *np.random.default_rng(seed).uniform(0, .05, 4)),
  "marked": lambda film, seed: _marked(film),
  "marked in the middle": lambda film, seed: _marked(film, .16, .5, True),
  "brighter": lambda film, seed: _shifted(film, 1, 30),
  "darker": lambda film, seed: _shifted(film, .75, -5),
  "borders missed by 2 pixels": lambda film, seed: film[:, 2:-2, 2:],
  "trimmed at the start": lambda film, seed: film[17:],
  "trimmed at both ends": lambda film, seed: film[7:-10],
  "grey": lambda film, seed: np.repeat(film.mean(-1, keepdims=True).astype(np.uint8), 3, -1),
  "everything": _anyhow,
  "everything and trimmed": lambda film, seed: _anyhow(film, seed)[5:-7],
}


@pytest.fixture(scope="module")
def shots():
  return _shots()


@pytest.fixture(scope="module")
def distinct(shots):
  return {f"{number:03}": _prints(_draw(shot, 6.), 6.) for number, shot in enumerate(shots)}


@pytest.fixture(scope="module")
def originals(shots):
  # From other parts of the set, so that all kinds of characters and places are copied.
  return {f"{number:03}": _draw(shots[number], FPS) for number in range(0, DISTINCT, DISTINCT // COPIED)}


def test_no_two_of_500_distinct_clips_are_taken_for_one(distinct):
  assert duplicates.find(distinct) == []
  # And not only among those that share a key: the likest of all are those before one background.
  near = [(f"{n:03}", f"{n + 1:03}") for n in range(0, DISTINCT, 5)]
  some = random.Random(0).sample(list(itertools.combinations(distinct, 2)), 2000)
  assert min(duplicates.distance(distinct[a], distinct[b]) for a, b in near + some) > 1.4 * duplicates.SAME


def test_keys_spare_comparing_all_with_all(distinct):
  crowds: dict[int, list[str]] = {}
  for name, prints in distinct.items():
    for key in duplicates.bands(prints):
      crowds.setdefault(key, []).append(name)
  near = {pair for crowd in crowds.values() for pair in duplicates.pairs(crowd)}
  assert len(near) < .01 * DISTINCT * (DISTINCT - 1) / 2
  assert max(map(len, crowds.values())) < 10


@pytest.mark.parametrize("change", CHANGES)
def test_every_planted_copy_is_found(change, distinct, originals):
  found = {**distinct}
  for seed, (name, film) in enumerate(originals.items()):
    found[f"copy of {name}"] = _prints(CHANGES[change](film, seed))
  assert duplicates.find(found) == [(name, f"copy of {name}") for name in originals]


def test_two_copies_cropped_apart_are_found_without_what_they_were_cropped_from(originals):
  for seed, film in enumerate(originals.values()):
    rng = np.random.default_rng(seed)
    found = {name: _prints(_cropped(film, *rng.uniform(0, .05, 4))) for name in "ab"}
    assert duplicates.find(found) == [("a", "b")]


def test_another_frame_rate_and_a_longer_clip_around_it_are_found(shots):
  before, after = _draw(shots[3], FPS, 9.), _draw(shots[4], FPS, 9.)
  for shot in shots[:30:5]:
    short = _prints(_draw(shot, FPS)[7:])
    assert duplicates.same(_prints(_draw(shot, 25.), 25.), short)
    assert duplicates.same(_prints(_draw(shot, 5.), 5.), short)
    long = before, _draw(shot, FPS), after
    assert duplicates.same(_prints(np.concatenate(long)), short)
    assert not duplicates.same(_prints(np.concatenate([long[0], long[2]])), short)


def test_blank_pictures_are_like_nothing(shots):
  rng = np.random.default_rng(0)
  blank = {"black": np.zeros((24, HEIGHT, WIDTH, 3), np.uint8), "white": np.full((24, HEIGHT, WIDTH, 3), 255, np.uint8),
           "red": np.full((24, HEIGHT, WIDTH, 3), (200, 30, 30), np.uint8),
           "dim": rng.integers(16, 19, (24, HEIGHT, WIDTH, 3)).astype(np.uint8),
           "landscape": np.repeat(np.linspace(0, 255, HEIGHT).astype(np.uint8)[None, :, None, None], 24, 0)
           .repeat(WIDTH, 2).repeat(3, 3),
           "gradient": np.broadcast_to(np.linspace(0, 255, WIDTH)[:, None], (24, HEIGHT, WIDTH, 3)).astype(np.uint8)}
  prints = {name: _prints(film) for name, film in blank.items()}
  assert not any(duplicates.bands(given) for given in prints.values())
  assert duplicates.find(prints) == [] and duplicates.distance(prints["black"], prints["black"]) == 1
  # Fades to one black do not make two films one, nor do they hide that one is a copy.
  fade = np.linspace(1, 0, 24)[:, None, None, None]
  faded = [_prints(np.concatenate([film, (film[-1:] * fade).astype(np.uint8), blank["black"]]))
           for film in (_draw(shots[0], FPS), _draw(shots[3], FPS))]
  assert not duplicates.same(*faded)
  assert duplicates.same(faded[0], _prints(_draw(shots[0], FPS)))


def test_prints_are_plain_and_the_same_each_time(shots):
  film = _draw(shots[0], FPS)
  prints = _prints(film)
  assert prints == _prints(film) and all(type(word) is int and 0 <= word < 2**64 for word in prints)
  assert duplicates.bands(prints) == sorted(set(duplicates.bands(list(prints))))
  whole, looks = duplicates.read(prints)
  assert whole.shape == (18, 6) and looks.shape == (3, 25, 6)
  assert duplicates.distance(prints, prints) == 0 and duplicates.distance(prints, ()) == 1
  assert duplicates.bands(()) == [] and not duplicates.same((), ())
  longer = _prints(np.repeat(film, 8, 0))
  assert len(duplicates.read(longer)[1]) == duplicates.LOOKS  # a long clip has no more crops
  with pytest.raises(video.Unreadable, match="ends before its frame 60"):
    duplicates.prints_of(enumerate(film), FPS, 60)


def test_prints_of_a_film_are_those_of_its_frames_inside_the_box(shots, tmp_path):
  frames = _draw(shots[0], FPS)
  bars = np.pad(frames, ((0, 0), (8, 8), (0, 0), (0, 0)))
  path = tmp_path / "x.mp4"
  path.write_bytes(video.encode(np.concatenate([bars[::-1], bars]), FPS))
  film = Film("x.mp4", str(path), "", 1, "h264", HEIGHT + 16, WIDTH, FPS, 72)
  for start, shown in ((36, frames), (0, frames[::-1])):
    prints = duplicates.prints(film, Shot("x.mp4", start, start + 36, (8, 0, HEIGHT, WIDTH)))
    assert duplicates.distance(prints, _prints(shown)) < duplicates.SAME / 2
    assert len(prints) == len(_prints(shown))
  with pytest.raises(video.Unreadable):
    duplicates.prints(film, Shot("x.mp4", 60, 90, (8, 0, HEIGHT, WIDTH)))


def test_distance_is_symmetric_and_no_order_of_clips_matters(distinct, originals):
  name = next(iter(originals))
  given = {**dict(itertools.islice(distinct.items(), 60)), "a": _prints(_anyhow(originals[name], 1)),
           "b": _prints(originals[name])}
  assert duplicates.distance(given["a"], given["b"]) == duplicates.distance(given["b"], given["a"])
  shuffled = list(given.items())
  random.Random(0).shuffle(shuffled)
  pairs = duplicates.find(given)
  assert pairs == duplicates.find(dict(shuffled)) == [(name, "a"), (name, "b"), ("a", "b")]


def test_crowds_are_met_in_part_and_in_order():
  names = [f"{n:03}" for n in range(10)]
  assert set(duplicates.pairs(reversed(names))) == set(itertools.combinations(names, 2))
  assert list(duplicates.pairs(names[::-1] * 2, 2)) == [
    pair for pair in itertools.combinations(names, 2) if int(pair[1]) - int(pair[0]) <= 2]


def test_groups_are_the_connected_parts():
  rng = random.Random(0)
  for _ in range(20):
    names = [f"{n:02}" for n in range(20)]
    edges = [tuple(rng.sample(names, 2)) for _ in range(rng.randrange(20))]
    near = np.eye(20, dtype=bool)
    for a, b in edges:
      near[int(a), int(b)] = near[int(b), int(a)] = True
    reach = np.linalg.matrix_power(near.astype(float), 20) > 0
    wanted = sorted({tuple(names[k] for k in np.flatnonzero(row)) for row in reach if row.sum() > 1})
    rng.shuffle(edges)
    assert duplicates.groups(edges) == [list(group) for group in wanted]


def _film(name: str, size: int = 1000, sha: str = "") -> Film:
  return Film(name, f"/films/{name}", sha or name, size, "h264", 96, 144, 12., 100)


def _candidate(film: str, start: int, height: int = 96, sharpness: float | None = 1.) -> Candidate:
  measures = {} if sharpness is None else {"sharpness": sharpness}
  return Candidate(Shot(film, start, start + 48, (0, 0, height, 144)), 12., measures, ())


def test_the_best_copy_is_kept():
  films = {name: _film(name, size) for name, size in (("a", 1000), ("b", 2000), ("c", 1000))}
  cases = [([_candidate("a", 0, 90), _candidate("b", 0, 96, .1), _candidate("c", 0, 80, 9.)], "b"),  # area before all
           ([_candidate("a", 0, sharpness=2.), _candidate("b", 0, sharpness=1.)], "a"),               # then sharpness
           ([_candidate("a", 0, sharpness=None), _candidate("c", 0, sharpness=.1)], "c"),
           ([_candidate("a", 0), _candidate("b", 0), _candidate("c", 0)], "b"),                       # then bytes
           ([_candidate("c", 0), _candidate("a", 0)], "a")]                                           # then the name
  for copies, winner in cases:
    names = [candidate.shot.id for candidate in copies]
    for order in itertools.permutations(copies):
      kept, rejected = duplicates.keep_best([_candidate("a", 90), *order], itertools.pairwise(names), films)
      assert [candidate.shot.id for candidate in kept] == sorted([f"{winner}/000000", "a/000090"])
      assert {(r.what, r.stage, r.reason, r.detail) for r in rejected} == {
        (name, "deduplicate", "copy", f"of {winner}/000000") for name in names if name != f"{winner}/000000"}


@pytest.mark.parametrize("seed", range(5))
def test_films_that_share_a_copy_fall_on_one_side(seed):
  rng = random.Random(seed)
  clips = {f"film-{n:03}.mp4": rng.randrange(4) for n in range(60)}
  names = list(clips)
  alone = duplicates.split(clips, [], .2)
  assert alone == pack.split_films({name: clips[name] for name in sorted(clips)}, .2)
  pairs = [tuple(rng.sample(names, 2)) for _ in range(15)]
  halves = duplicates.split(clips, pairs, .2)
  side = {film: part for part, items in halves.items() for film, _ in items}
  assert all(side.get(a, side.get(b)) == side.get(b, side.get(a)) for a, b in pairs)
  assert {film: len(numbers) for items in halves.values() for film, numbers in items} == {
    film: count for film, count in clips.items() if count}
  assert halves["held_out"] and halves["train"]
  assert duplicates.split(dict(reversed(clips.items())), pairs[::-1], .2) == halves


def test_episodes_that_share_an_opening_are_split_and_one_film_twice_is_not():
  shots = {f"{episode:03}": [f"{episode:03}/{n:03}" for n in range(40)] for episode in range(60)} | {
    "opening": [f"opening/{n}" for n in range(5)], "again": [f"again/{n:03}" for n in range(30)]}
  films = {shot: film for film, inside in shots.items() for shot in inside}
  opening = [pair for n in range(5) for pair in itertools.pairwise(inside[n] for inside in shots.values())]
  again = list(zip(shots["007"][10:], shots["again"], strict=True))
  for copies in (opening + again, again[::-1] + [pair[::-1] for pair in opening]):
    assert duplicates.same_films(copies, films) == [("007", "again")]
  halves = duplicates.split({film: len(inside) for film, inside in shots.items()}, [("007", "again")], .1)
  assert .02 < sum(len(numbers) for _, numbers in halves["held_out"]) / len(films) < .3


def test_where_all_films_share_copies_nothing_is_held_out_and_one_film_is_divided():
  chain = list(itertools.pairwise("abcd"))
  assert duplicates.split(dict.fromkeys("abcd", 3), chain, .3) == {
    "train": [(film, range(3)) for film in "abcd"], "held_out": []}
  assert duplicates.split({"a": 10}, [], .3) == pack.split_films({"a": 10}, .3)
