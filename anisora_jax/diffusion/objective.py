"""Predicted and true velocity -> loss, weighted by noise time and by what was hidden.

  L = sum_bf h_bf w(t_bf) mse_bf / sum_bf h_bf
mse_bf is the mean over the hidden cells of a frame, h_bf is 1 where a frame has hidden cells and 0 where it was given
whole: its target is noise nobody can predict. w is a fixed function of t with mean 1 under the training distribution,
so that dividing by sum h (and not by sum h w) keeps a sample's weight independent of its batch mates.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anisora_jax.diffusion.times import TimeDraw
from anisora_jax.errors import pick
from anisora_jax.shapes import Latents, Scalar, Times

QUANTILES = 4096  # of the training distribution, over which the mean weight is taken

WEIGHTS: dict[str, Callable] = {  # not yet normalised; name in configs -> function of t
  "none": jnp.ones_like,
  # The bell around t = 1/2 that Wan's public trainers use, 0 at both ends.
  "bell": lambda t: jnp.exp(-2 * (t - 0.5) ** 2) - jnp.exp(-0.5),
}


def weight(t: Float[Array, "*b"], name: str, draw: TimeDraw) -> Float[Array, "*b"]:
  """The weight of a noise time, with mean 1 over the times that `draw` trains on."""
  bell = pick(WEIGHTS, name, "loss weight")
  quantiles = (jnp.arange(QUANTILES) + 0.5) / QUANTILES
  return bell(t) / bell(draw.at(quantiles)).mean()


def frame_errors(predicted: Latents, true: Latents, hidden: Bool[Array, "b f h w 1"]) -> Times:
  """Mean squared error over the hidden cells of each frame, 0 where nothing is hidden. f32."""
  error = jnp.square(predicted.astype(jnp.float32) - true.astype(jnp.float32)).mean(-1, keepdims=True)
  # Summed together, so that devices send one message, and not before the network is done (see training.step.after).
  total, cells = jnp.stack([jnp.where(hidden, error, 0.0), hidden.astype(jnp.float32)]).sum((3, 4, 5))
  return total / jnp.maximum(cells, 1)


def loss_sums(errors: Times, weights: Times, counted: Bool[Array, "b f"]) -> tuple[Scalar, Scalar]:
  """(weighted sum of the errors, number of frames that count); the loss is their ratio.

  Kept apart so that micro-batches of any size add up to one large batch.
  """
  total, count = jnp.stack([errors * weights * counted, counted.astype(jnp.float32)]).sum((1, 2))
  return total, count
