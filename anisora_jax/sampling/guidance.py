"""How several velocities of one network are combined into the one that a solver follows."""

from collections.abc import Callable

import jax.numpy as jnp

from anisora_jax.shapes import Latents, Times

Network = Callable[[Latents, Times], Latents]  # (latents, noise time told) -> velocity, caption and condition bound


def text(captioned: Network, blank: Network, scale: float) -> Network:
  """Follows the caption more closely than the network alone would: blank + scale (captioned - blank).

  captioned, blank: the network with the caption and with the empty caption. scale: a Python number, so that at 1, where
  the blank term cancels, it is known before compiling that one pass is enough.
  From: Ho & Salimans 2022, classifier-free guidance, arXiv:2207.12598.
  """
  if scale == 1:
    return captioned

  def guided(x: Latents, told: Times) -> Latents:
    away = blank(x, told)
    # The second pass waits for the first: side by side they would take twice the memory, and on simulated devices
    # their collectives could meet in another order and wait forever (see training.step.after).
    x = jnp.where(jnp.isnan(away), away, x)
    return away + scale * (captioned(x, told) - away)

  return guided
