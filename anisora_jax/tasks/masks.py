"""Which pixels are given, one task a function; a mixture of them is drawn inside the compiled step.

A mask is `[F, h, w]`: time in pixel frames, space in latent cells, True = given. Every task is the same few arrays to
the network, so one compiled step serves them all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from anisora_jax.errors import BadInput, pick
from anisora_jax.shapes import PixelMask

SampleMask = Bool[Array, "F h w"]
Region = Bool[Array, "#F h w"]


class Scene(NamedTuple):
  """What a task may look at: the tracked character in latent cells (all False: none) and the codec's stride m."""

  character: SampleMask
  stride: int


Task = Callable[[Key[Array, ""], Scene], SampleMask]


def of_frames(given: Bool[Array, "F"], scene: Scene) -> SampleMask:
  """Whole frames given."""
  return jnp.broadcast_to(given[:, None, None], scene.character.shape)


def _numbers(scene: Scene) -> Int[Array, "F"]:
  return jnp.arange(scene.character.shape[0])


def nothing(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """Text alone."""
  return jnp.zeros_like(scene.character)


def first(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """Image to video."""
  return of_frames(_numbers(scene) == 0, scene)


def last(key: Key[Array, ""], scene: Scene) -> SampleMask:
  return of_frames(_numbers(scene) == scene.character.shape[0] - 1, scene)


def first_last(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """In-betweening. Looping is the same mask with one image at both ends, and is asked for when sampling."""
  return first(key, scene) | last(key, scene)


def keyframes(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """One to five frames anywhere, each the last that its latent frame covers."""
  count_key, place_key = jax.random.split(key)
  frame = _numbers(scene)
  aligned = frame % scene.stride == 0
  count = jax.random.randint(count_key, (), 1, 6)
  rank = jnp.argsort(jnp.argsort(jnp.where(aligned, jax.random.uniform(place_key, frame.shape), 2.0)))
  return of_frames(aligned & (rank < count), scene)


def every_nth(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """Frames 0, n, 2n ..., n from 2 to 8: repair of what flickers between good frames."""
  return of_frames(_numbers(scene) % jax.random.randint(key, (), 2, 9) == 0, scene)


def continuation(key: Key[Array, ""], scene: Scene) -> SampleMask:
  """The first frames, from two to half of the clip, in whole latent frames; one alone would be the task `first`."""
  half = max(1, (1 + (scene.character.shape[0] - 1) // scene.stride) // 2)
  known = jax.random.randint(key, (), min(2, half), half + 1)
  return of_frames(_numbers(scene) <= (known - 1) * scene.stride, scene)


def _box(key: Key[Array, ""], scene: Scene) -> Region:
  """A rectangle, a quarter to three quarters of each side, the same in every frame."""
  _, h, w = scene.character.shape

  def span(key: Key[Array, ""], side: int) -> Bool[Array, "side"]:
    length_key, place_key = jax.random.split(key)
    length = jnp.round(side * jax.random.uniform(length_key, minval=0.25, maxval=0.75)).clip(1, max(1, side - 1))
    start = jnp.floor((side - length + 1) * jax.random.uniform(place_key))
    return (jnp.arange(side) >= start) & (jnp.arange(side) < start + length)

  rows, columns = jax.random.split(key)
  return (span(rows, h)[:, None] & span(columns, w))[None]


def _blob(key: Key[Array, ""], scene: Scene) -> Region:
  """Three discs that overlap or not."""
  _, h, w = scene.character.shape
  place_key, size_key = jax.random.split(key)
  centre = jax.random.uniform(place_key, (3, 2)) * jnp.array([h, w])
  radius = jax.random.uniform(size_key, (3,), minval=0.15, maxval=0.35) * min(h, w)
  row, column = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing="ij")
  distance = jnp.hypot(row - centre[:, :1, None], column - centre[:, 1:, None])
  return (distance < jnp.maximum(radius, 1.0)[:, None, None]).any(0)[None]


def _character(key: Key[Array, ""], scene: Scene) -> Region:
  """The tracked character with a margin of one cell; a blob where the clip has no track."""
  def spread(x: SampleMask, axis: int) -> SampleMask:
    before = jnp.roll(x, 1, axis).at[(slice(None),) * axis + (0,)].set(False)
    after = jnp.roll(x, -1, axis).at[(slice(None),) * axis + (-1,)].set(False)
    return x | before | after

  return jnp.where(scene.character.any(), spread(spread(scene.character, 1), 2), _blob(key, scene))


def region(shape: Callable[[Key[Array, ""], Scene], Region]) -> Task:
  """A task that keeps or regenerates a region, by a coin. Frame 0 is given whole."""
  def task(key: Key[Array, ""], scene: Scene) -> SampleMask:
    coin, place = jax.random.split(key)
    inside = jnp.broadcast_to(shape(place, scene), scene.character.shape)
    return jnp.where(jax.random.bernoulli(coin), inside, ~inside) | first(key, scene)

  return task


TASKS = {  # name in configs -> (key, scene) -> mask
  "none": nothing,
  "first": first,
  "last": last,
  "first_last": first_last,
  "loop": first_last,
  "keyframes": keyframes,
  "every_nth": every_nth,
  "continuation": continuation,
  "box": region(_box),
  "blob": region(_blob),
  "character": region(_character),
}


def _with_stride(task: Task, stride: int, key: Key[Array, ""], character: SampleMask) -> SampleMask:
  return task(key, Scene(character, stride))  # the stride fixes shapes and must not be traced


@dataclass(frozen=True)
class Mixture:
  """Tasks and how often each is drawn; weights need not add to 1."""

  weights: dict[str, float]

  def __post_init__(self):
    for name, weight in self.weights.items():
      pick(TASKS, name, "task")
      if not weight >= 0:
        raise BadInput(f"task {name!r} has weight {weight}: take 0 or more.")
    if not sum(self.weights.values()) > 0:
      raise BadInput(f"all task weights are 0: give one of {', '.join(TASKS)} a positive weight.")

  def __call__(self, keys: Key[Array, "b"], character: PixelMask, stride: int) -> PixelMask:
    """One mask for each sample's key."""
    tasks = [partial(_with_stride, TASKS[name], stride) for name, weight in self.weights.items() if weight > 0]
    weights = np.array([weight for weight in self.weights.values() if weight > 0])

    def one(key: Key[Array, ""], character: SampleMask) -> SampleMask:
      choice, draw = jax.random.split(key)
      number = jax.random.choice(choice, len(tasks), p=weights / weights.sum())
      return jax.lax.switch(number, tasks, draw, character)

    return jax.vmap(one)(keys, character)
