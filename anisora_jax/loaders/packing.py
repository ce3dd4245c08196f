"""Short clips share rows: several encoded clips of one height and width, one after the other along the frames.

How many clips of each length a row holds is settled once, for all clips together: rows of a pass over the records are
the same patterns of lengths in another order, and each length has an order of its own. So every record comes exactly
once a pass, a pass always has as many rows, and any row is found by its number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from anisora_jax.loaders import rows
from anisora_jax.loaders.buckets import Bucket
from anisora_jax.loaders.latents import Latents, read_index


class Pattern(NamedTuple):
  """clips: how many of each length a row holds. rows: how many rows of a pass are such."""

  clips: tuple[int, ...]
  rows: int


def patterns(lengths: Sequence[int], counts: Sequence[int], frames: int, most: int) -> list[Pattern]:
  """Rows of `frames` frames and at most `most` clips that hold counts[i] clips of lengths[i]: the longest that fits.

  That is first-fit decreasing (Johnson 1973), at most 11/9 as many rows as can be, and one more; without `most`.
  """
  left, found = list(counts), []
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  while any(left):
    room, clips = frames, [0] * len(lengths)
    for i in order:
      clips[i] = min(left[i], room // lengths[i], most - sum(clips))
      room -= clips[i] * lengths[i]
    times = min(left[i] // clips[i] for i in order if clips[i])
    left = [have - times * taken for have, taken in zip(left, clips, strict=True)]
    found.append(Pattern(tuple(clips), times))
  return found


class Plan:
  """Row number, for ever -> the clips of the row as (which length, place in the order of that length).

  count: rows of a pass. seed: of the order of rows, anew in each pass; None keeps it, and ends after one pass.
  """

  def __init__(self, found: Sequence[Pattern], seed: Sequence[int] | None):
    self._clips = np.array([pattern.clips for pattern in found])
    self._kinds = np.repeat(np.arange(len(found)), [pattern.rows for pattern in found])
    self._all, self.count, self._seed = self._clips[self._kinds].sum(0), len(self._kinds), seed
    self._pass = lru_cache(maxsize=4)(self._draw)

  def _draw(self, number: int) -> tuple[Int[np.ndarray, "r"], Int[np.ndarray, "r lengths"]]:
    """(the pattern of each row of a pass, the clips of each length before it)."""
    kinds = self._kinds
    if self._seed is not None:
      kinds = np.random.default_rng([*self._seed, number]).permutation(kinds)
    taken = self._clips[kinds]
    return kinds, np.cumsum(taken, 0) - taken + number * self._all

  def __getitem__(self, row: int) -> list[tuple[int, int]]:
    number, place = divmod(row, self.count)
    if number and self._seed is None:
      return []
    kinds, before = self._pass(number)
    return [(length, int(before[place, length]) + k) for length, count in enumerate(self._clips[kinds[place]])
            for k in range(count)]


@dataclass(frozen=True)
class Canvas:
  """A row: latent frames, the most clips in it, and how many pixel frames of a mask a latent frame has."""

  frames: int
  clips: int
  stride: int

  def row(self, clips: Sequence[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    """Clips one after the other, the rest empty. like: a clip, of any length, that gives sizes and types."""
    wide = {"latents": self.frames, "known": self.frames, "mask": self.frames * self.stride}
    out: dict[str, Any] = {"caption": [clip["caption"] for clip in clips],
                           "segment": np.full(self.frames, -1, np.int32),
                           "id": np.full(self.clips, -1, np.int64), "ok": np.ones(self.clips, np.float32)}
    for name, x in like.items():
      if isinstance(x, np.ndarray) and name not in out:
        shape = (wide[name], *x.shape[1:]) if name in wide else (self.clips, *x.shape)
        out[name] = np.zeros(shape, x.dtype)
    first = 0
    for number, clip in enumerate(clips):
      end = first + len(clip["latents"])
      out["segment"][first:end] = number
      for name in out.keys() - {"caption", "segment"}:
        if name == "mask":  # the first pixel frame has a latent frame of its own
          filled = np.concatenate([clip[name][:1]] * (self.stride - 1) + [clip[name]])
          out[name][first * self.stride:end * self.stride] = filled
        elif name in wide:
          out[name][first:end] = clip[name]
        else:
          out[name][number] = clip[name]
      first = end
    return out


def sizes(folders: Sequence[Path], split: str, bucket: Bucket) -> list[Bucket]:
  """The sizes of encoded clips that fit the rows of a bucket, longest first. Raises BadInput."""
  found = {Bucket(*map(int, name.split("x")), batch=1) for folder in folders
           for name, about in read_index(folder)["sizes"].items()
           if any(shard["records"] for shard in about["splits"][split])}
  same = (bucket.height, bucket.width)
  return sorted((size for size in found if (size.height, size.width) == same and size.frames <= bucket.frames),
                key=lambda size: -size.frames)


class Packed:
  """Rows of several clips. count: rows of a pass over all records; clips: records that come; dealt: of `rows`."""

  def __init__(self, canvas: Canvas, sizes: Sequence[Sequence[Latents | None]], weights: Sequence[float] | None,
               seed: Sequence[int]):
    """sizes: the clips of each length, of each source. weights: of sources; None takes every record once, in order."""
    totals = [sum(len(of_size[source] or ()) for of_size in sizes) for source in range(len(sizes[0]))]
    self.clips = sum(totals)
    taken = [rows.parts([range(len(source or ())) for source in of_size], totals, weights) for of_size in sizes]
    counts = [max(1, round(rows.a_pass(found, totals, weights))) for found in taken]
    lengths = [next(source for source in of_size if source).shapes.latents[0] for of_size in sizes]
    self._seed = seed if weights else None
    self._plan = Plan(patterns(lengths, counts, canvas.frames, canvas.clips), self._seed)
    self._canvas, self._sizes, self.count = canvas, sizes, Fraction(self._plan.count)
    self._orders = [rows.Order(found, (*seed, size)) for size, found in enumerate(taken)]
    self.dealt = [rows.dealt(found) for found in taken]

  def __getitem__(self, place: int) -> tuple[dict[str, Any], rows.Bad]:
    clips, bad = [], []
    for size, number in self._plan[place] or self._plan[0][:1]:
      turn = self._orders[size][number]
      source = turn.part.source
      made, missed = rows.readable(self._sizes[size][source], turn, self._seed and [*self._seed, size, number])
      number = (len(made["latents"]) * 2**16 + source) * 2**32 + turn.record
      clips.append({**made, "id": np.int64(number)})
      bad += missed
    return self._canvas.row(clips if self._plan[place] else [], clips[0]), bad
