"""Finds copies among clips, however they were encoded, scaled, cropped, marked, brightened or trimmed.

A picture's code is 192 signs of its cosine transform, 64 of brightness and of each colour difference, and 192 marks of
which signs are clear. Only waves that vary along the rows count: what all landscapes share, bright above and dark
below, tells no two of them apart. Two pictures differ by the share of signs that are clear in both and unlike; signs
near zero, which any encoder flips, have no say.

A clip is coded whole RATE times a second, and at most LOOKS times in 25 crops of up to 5 % a side. Copies are found by
laying the crops of one clip on the whole pictures of the other at every shift in time, and the other way round. Pairs
to compare come from `bands`: clips that share a key, so that no one compares all with all.

Signs of the cosine transform: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"; keys
from parts of a code: Indyk and Motwani 1998. Colour, marks, crops and shifts are ours; the tests measure them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import cv2
import numpy as np
from pack import split_films

from anisora_jax.loaders import video
from curation import boxed
from curation.items import Candidate, Film, Rejected, Shot

T = TypeVar("T")
SIDE = 160        # pixels a side of the square that pictures are coded from
RATE = 6.         # codes of the whole picture a second: a copy's frames lie 1/12 s off at most
LOOKS = 6         # moments of a clip that are coded in all crops, at most; a second apart at least
CUTS = ((0, 0), (8, 0), (0, 8), (4, 4), (8, 8))  # pixels of SIDE cut off at the two ends of an axis: up to 5 %
CROPS = len(CUTS) ** 2  # the first is the whole picture
CLEAR = .75       # share of the signs that are marked: the largest, frequency weighted against the fall of spectra
FLOOR = .25       # mean grey levels a wave must have for its sign to mean anything
LEAST = 24        # clear signs of brightness, of 64, below which a picture is blank: fades, titles, flat colour
SAME = .03        # share of unlike signs; copies measured up to .02, drawn shots before one background from .044
OVERLAP = .6      # of the shorter clip's length that two copies share at least
SAME_FILM = .3    # of the clips of each, copies that make two films one: episodes share an eighth, a second rip most
WORDS = 6         # 64-bit words of a code: signs of brightness, red and blue difference, and their marks


def _waves(count: int) -> np.ndarray:
  """Frequencies (down, across) of the lowest `count` waves that vary along the rows, [count, 2]."""
  grid = [(down, across) for down in range(count) for across in range(1, count)]
  return np.array(sorted(grid, key=lambda wave: (sum(wave), wave))[:count])


_WAVES = _waves(64)
_LOW = int(_WAVES.max()) + 1


def _bases() -> np.ndarray:
  """The cosine transform of each cut of an axis, zero where it is cut off, [cuts, frequencies, SIDE]; of means."""
  bases = np.zeros((len(CUTS), _LOW, SIDE))
  for base, (first, last) in zip(bases, CUTS, strict=True):
    length = SIDE - first - last
    place = (np.arange(length) + .5) * np.pi / length
    base[:, first:SIDE - last] = np.cos(np.arange(_LOW)[:, None] * place) * 2 / length
  return bases


_BASES = _bases()


def _pack(signs: np.ndarray) -> np.ndarray:
  """Bits [..., 64] as 64-bit words [...]."""
  return np.ascontiguousarray(np.packbits(signs, axis=-1)).view(">u8")[..., 0].astype(np.uint64)


def _codes(picture: np.ndarray, cuts: slice) -> np.ndarray:
  """Codes of a picture in all crops that these cuts of both axes make, [crops, WORDS]; zeros where it is blank.

  picture: uint8 RGB [h, w, 3].
  """
  shrinks = min(picture.shape[:2]) >= SIDE
  square = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  planes = np.moveaxis(cv2.cvtColor(square, cv2.COLOR_RGB2YCrCb), -1, 0).astype(np.float64)
  bases = _BASES[cuts]
  # [cuts, planes, frequencies down, columns]; then every cut of the columns of every cut of the rows.
  down = np.matmul(bases[:, None], planes)
  waves = np.matmul(down[:, None], bases[None, :, None].swapaxes(-1, -2)).reshape(-1, 3, _LOW, _LOW)
  waves = waves[..., _WAVES[:, 0], _WAVES[:, 1]]
  strength = np.abs(waves) * np.sqrt(_WAVES.sum(-1))
  least = np.sort(strength, -1)[..., -round(CLEAR * waves.shape[-1]), None]
  clear = (strength >= least) & (np.abs(waves) >= FLOOR)
  codes = np.concatenate([_pack(waves > 0), _pack(clear)], -1)
  return np.where(clear[:, :1].sum(-1) >= LEAST, codes, np.uint64(0))


def _moments(count: int) -> np.ndarray:
  """Which of `count` whole pictures are also coded in all crops."""
  step = max(int(RATE), -(-count // LOOKS))
  return np.arange(min(step // 2, max(count - 1, 0)), count, step)


def prints_of(pictures: Iterable[tuple[int, np.ndarray]], fps: float, length: int) -> tuple[int, ...]:
  """The prints of a clip of `length` frames shown at `fps`, from those of its `due` frames; one is held at a time.

  pictures: (number from 0, uint8 RGB [h, w, 3]). Returns the number of whole pictures, their codes, then those of all
  crops at each of the `_moments`, every number < 2^64. Raises video.Unreadable where fewer pictures come.
  """
  wanted = due(fps, length)
  moments = set(_moments(len(wanted)).tolist())
  whole, looks = [], []
  for number, picture in pictures:
    now = set(range(*np.searchsorted(wanted, [number, number + 1]).tolist()))
    if now:
      codes = _codes(picture, slice(None) if now & moments else slice(1))
      whole += [codes[0]] * len(now)
      looks += [codes] * len(now & moments)
  if len(whole) < len(wanted):
    raise video.Unreadable(f"the shot ends before its frame {length}")
  return (len(whole), *np.array(whole, np.uint64).ravel().tolist(), *np.array(looks, np.uint64).ravel().tolist())


def due(fps: float, length: int) -> np.ndarray:
  """Numbers of the frames of a clip that are coded, RATE a second; of a slow film the same more than once."""
  return video.pace(fps, RATE, video.paced_length(length, fps, RATE))


def prints(film: Film, shot: Shot) -> tuple[int, ...]:
  """The prints of a shot inside its box. Raises video.Unreadable."""
  length = shot.stop - shot.start
  return prints_of(boxed.pictures(film, shot, SIDE, set(due(film.fps, length).tolist())), film.fps, length)


def read(prints: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Codes of the whole pictures [pictures, WORDS], and of all crops at each moment [moments, CROPS, WORDS]."""
  count = prints[0] if prints else 0
  words = np.array(prints[1:], np.uint64).reshape(-1, WORDS)
  return words[:count], words[count:].reshape(-1, CROPS, WORDS)


def distance(a: Sequence[int], b: Sequence[int]) -> float:
  """The share of clear signs that are unlike in the best alignment of two clips' prints; 1 where nothing compares."""
  (whole_a, looks_a), (whole_b, looks_b) = read(a), read(b)
  least = math.ceil(OVERLAP * min(len(whole_a), len(whole_b)))
  return min(_apart(whole_a, looks_b, len(whole_b), least), _apart(whole_b, looks_a, len(whole_a), least))


def _apart(whole: np.ndarray, looks: np.ndarray, length: int, least: int) -> float:
  """The same with the crops of one clip laid on the whole pictures of the other.

  length: whole pictures of the clip of the looks. least: whole pictures that must overlap.
  """
  if not len(whole) or not len(looks):
    return 1.
  marks = whole[:, None, None, 3:] & looks[..., 3:]
  clear = np.bitwise_count(marks).sum(-1, dtype=np.int64)  # [pictures, moments, crops]
  unlike = np.bitwise_count((whole[:, None, None, :3] ^ looks[..., :3]) & marks).sum(-1, dtype=np.int64)
  shifts = np.arange(least - length, len(whole) - least + 1)
  at = _moments(length) + shifts[:, None]
  there = (at >= 0) & (at < len(whole))
  at, moment = np.where(there, at, 0), np.arange(len(looks))
  clear = clear[at, moment] * there[..., None]             # [shifts, moments, crops]
  unlike = unlike[at, moment] * there[..., None]
  told = (clear >= LEAST).sum(1) >= min(2, len(looks))
  share = np.where(told, unlike.sum(1) / np.maximum(clear.sum(1), 1), 1.)
  return float(share.min(initial=1.))


def same(a: Sequence[int], b: Sequence[int]) -> bool:
  """Whether two clips' prints are of one clip."""
  return distance(a, b) <= SAME


def bands(prints: Sequence[int]) -> list[int]:
  """The keys of a clip, rising; copies share some, strangers seldom any.

  Five of every picture with colour, each of 12 signs of brightness and 8 of either colour, and two of 28 signs of
  brightness, by which copies without colour are found.
  """
  whole, looks = read(prints)
  codes = np.concatenate([whole, looks.reshape(-1, WORDS)])
  codes = codes[codes[:, 3] > 0]
  keys = [_key(5 + part, [(codes[:, 0], 28 * part, 28)]) for part in range(2)]
  luma, red, blue = codes[np.bitwise_count(codes[:, 4:]).sum(-1) >= LEAST, :3].T
  keys += [_key(part, [(luma, 12 * part, 12), (red, 6 * part, 8), (blue, 6 * part, 8)]) for part in range(5)]
  return np.unique(np.concatenate(keys)).tolist()


def _key(kind: int, parts: Sequence[tuple[np.ndarray, int, int]]) -> np.ndarray:
  """64-bit keys of chosen signs. parts: (words, first sign, number of signs), 28 signs in all."""
  key = np.full(len(parts[0][0]), kind, np.uint64)
  for words, first, count in parts:
    key = key << np.uint64(count) | words >> np.uint64(64 - first - count) & np.uint64(2**count - 1)
  return key


def pairs(clips: Iterable[T], most: int = 100) -> Iterator[tuple[T, T]]:
  """The pairs to compare among clips that share a key, in order of their names.

  most: of a larger crowd each clip meets the next `most` only; a copy mostly shares other keys too.
  """
  names = sorted(set(clips))
  for number, name in enumerate(names):
    yield from ((name, other) for other in names[number + 1:number + 1 + most])


def find(prints: Mapping[str, Sequence[int]], most: int = 100) -> list[tuple[str, str]]:
  """All pairs of copies, in order: what bands, a group-by, `pairs` and `same` give. prints: id -> prints."""
  crowds: dict[int, list[str]] = {}
  for name, given in prints.items():
    for key in bands(given):
      crowds.setdefault(key, []).append(name)
  near = sorted({pair for crowd in crowds.values() for pair in pairs(crowd, most)})
  return [(a, b) for a, b in near if same(prints[a], prints[b])]


def groups(copies: Iterable[tuple[str, str]]) -> list[list[str]]:
  """Names that hang together by pairs, each group and the groups in order of names."""
  head: dict[str, str] = {}

  def top(name: str) -> str:
    while head.setdefault(name, name) != name:
      head[name] = name = head[head[name]]
    return name

  for a, b in copies:
    first, second = sorted((top(a), top(b)))
    head[second] = first
  found: dict[str, list[str]] = {}
  for name in sorted(head):
    found.setdefault(top(name), []).append(name)
  return sorted(found.values())


def best(copies: Sequence[Candidate], films: Mapping[str, Film]) -> Candidate:
  """The copy to keep: largest picture, then sharpest, then most bytes a frame, then first by id.

  A copy without the measure "sharpness" counts as the least sharp. films: by name.
  """
  def rank(copy: Candidate) -> tuple:
    _, _, height, width = copy.shot.box
    film = films[copy.shot.film]
    return -height * width, -copy.measures.get("sharpness", -math.inf), -film.bytes / max(film.frames, 1), copy.shot.id
  return min(copies, key=rank)


def keep_best(candidates: Iterable[Candidate], copies: Iterable[tuple[str, str]], films: Mapping[str, Film]
              ) -> tuple[list[Candidate], list[Rejected]]:
  """The candidates without all but the best of each group, in order of ids, and those turned away."""
  by_id = {candidate.shot.id: candidate for candidate in candidates}
  winners = {}
  for group in groups(copies):
    winner = best([by_id[name] for name in group], films).shot.id
    winners |= {name: winner for name in group if name != winner}
  kept = [by_id[name] for name in sorted(by_id) if name not in winners]
  return kept, [Rejected(name, by_id[name].shot.film, "deduplicate", "copy", f"of {winners[name]}")
                for name in sorted(winners)]


def same_films(copies: Iterable[tuple[str, str]], films: Mapping[str, str]) -> list[tuple[str, str]]:
  """Pairs of films each of which holds copies of at least SAME_FILM of the other's clips, in order.

  That is one film twice; episodes that share an opening stay apart. copies: pairs of clips. films: clip -> its film, of
  all clips.
  """
  shared: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
  for pair in copies:
    (film, clip), (other, copy) = sorted((films[name], name) for name in pair)
    if film != other:
      here, there = shared.setdefault((film, other), (set(), set()))
      here.add(clip)
      there.add(copy)
  sizes = Counter(films.values())
  return sorted(pair for pair, sides in shared.items()
                if all(len(side) >= SAME_FILM * sizes[film] for film, side in zip(pair, sides, strict=True)))


def split(clips: Mapping[str, int], copies: Iterable[tuple[str, str]], share: float
          ) -> dict[str, list[tuple[str, range]]]:
  """Gives every film to train or held_out as data/pack.py does, films that are copies to the same one.

  clips: film -> number of its clips that are kept. copies: pairs of films, see `same_films`. Films that
  hang together go where the first of their names would go alone; where all do, nothing is held out.
  """
  head = {name: group[0] for group in groups(copies) for name in group}
  together: dict[str, list[str]] = {}
  for film, count in sorted(clips.items()):
    if count:
      together.setdefault(head.get(film, film), []).append(film)
  if len(together) == 1 and len(next(iter(together.values()))) > 1:
    share = 0
  placed = split_films({first: sum(clips[film] for film in films) for first, films in together.items()}, share)
  return {side: [(film, range(clips[film]) if len(together[first]) > 1 else numbers)
                 for first, numbers in items for film in together[first]] for side, items in placed.items()}
