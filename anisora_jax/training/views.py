"""Clips -> what training without encoders needs of them: clean latents, and what some masks give of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from anisora_jax import keys
from anisora_jax.errors import BadInput
from anisora_jax.models.codec import Codec
from anisora_jax.shapes import Films, Latents
from anisora_jax.tasks.conditions import cells_touched, condition, pictures
from anisora_jax.tasks.masks import Mixture
from anisora_jax.training.step import unit

See = Callable[[Float[Array, "b H W 3"]], Float[Array, "b i y"]]  # pictures in [-1, 1] -> image tokens


@dataclass(frozen=True)
class Draw:
  """How masks are drawn. count: of each clip; drop: probability that a mask gives nothing; pictures: shown, 0 .. 2."""

  tasks: Mixture
  count: int
  drop: float
  pictures: int
  seed: int

  def __post_init__(self):
    if not 0 <= self.drop <= 1:
      raise BadInput(f"drop_condition = {self.drop} is no share: take 0 .. 1.")


class Encoded(NamedTuple):
  """A batch of clips, encoded, float16, and of each clip v views: a mask, what it gives, and its image tokens."""

  latents: Latents
  mask: Bool[Array, "v b F h w"]
  known: Float[Array, "v b f h w c"]
  image: Float[Array, "v b i y"]


def look(draw: Draw, codec: Codec, see: See | None, frames: Films, character: Bool[Array, "b F H W"],
         clips: Int[Array, "b"]) -> Encoded:
  """Encodes clips and what is given of them.

  see: the image encoder; None for no image tokens. clips: a number of each clip, from which alone its masks are drawn.
  """
  films = unit(frames)
  cells = cells_touched(character, codec.spatial)

  def view(number: Array) -> tuple[Array, Array, Array]:
    task, drop = (keys.per_sample(keys.key(draw.seed, number, purpose), clips) for purpose in ("task", "drop"))
    kept = jax.vmap(jax.random.uniform)(drop) >= draw.drop
    mask = draw.tasks(task, cells, codec.temporal) & kept[:, None, None, None]
    known = condition(films, mask, codec.encode, codec.temporal).known
    image = jnp.zeros((len(clips), 0, 0))
    if see:
      shown = pictures(films, mask, draw.pictures)
      image = rearrange(see(rearrange(shown, "b k H W c -> (b k) H W c")), "(b k) i y -> b (k i) y", k=draw.pictures)
    return mask, known.astype(jnp.float16), image.astype(jnp.float16)

  mask, known, image = jax.lax.map(view, jnp.arange(draw.count))
  return Encoded(codec.encode(films).astype(jnp.float16), mask, known, image)
