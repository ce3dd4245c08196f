"""The straight path between a clean clip and noise, walked by each frame at its own time.

  x_t = (1 - t) x0 + t eps,   v = dx_t / dt = eps - x0,   t in [b, f]
v does not depend on t, so along any monotone t the Euler step x += v (t' - t) is exact for a perfect v.
From: Liu et al. 2022, arXiv:2209.03003; one time a frame: Pusa, arXiv:2507.16116, eq. 6-10.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anisora_jax.shapes import Latents, Times


def over_cells(t: Float[Array, "*b f"]) -> Float[Array, "*b f 1 1 1"]:
  """Frame times, ready to broadcast over rows, columns and channels."""
  return t[..., None, None, None]


def noisy(clean: Latents, noise: Latents, t: Times) -> Latents:
  """Latents at noise time t. Exact at both ends: t = 0 gives `clean`, t = 1 gives `noise`, bit for bit."""
  t = over_cells(t)
  return jnp.where(t == 0, clean, jnp.where(t == 1, noise, (1 - t) * clean + t * noise))


def velocity(clean: Latents, noise: Latents) -> Latents:
  """The direction from clean to noise, which the network learns."""
  return noise - clean


def clean_from(x: Latents, v: Latents, t: Times) -> Latents:
  """The clean latents that a velocity points back to: x - t v."""
  return x - over_cells(t) * v
