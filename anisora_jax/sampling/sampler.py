"""Noise -> latents: one scan over the rows of a plan, with a solver and a (guided) network."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from anisora_jax.errors import BadInput
from anisora_jax.sampling.guidance import Network
from anisora_jax.sampling.plans import Plan
from anisora_jax.sampling.solvers import Row, Solver
from anisora_jax.shapes import Latents


def begin(plan: Plan, noise: Latents, clean: Latents) -> Latents:
  """The latents that sampling starts from: (1 - start) clean + start noise.

  Exact at both ends: a given frame (start 0) is `clean` bit for bit, a free frame (start 1) does not depend on it.
  """
  share = jnp.asarray(plan.start)[:, None, None, None]
  return jnp.where(share == 0, clean, jnp.where(share == 1, noise, (1 - share) * clean + share * noise))


def rows(plan: Plan, piece: slice = slice(None)) -> Row:
  """The plan as a solver sees it, one leading row a scan step. Past the last row the network would be told the same.

  piece: which rows, all by default.
  """
  tau, told = jnp.asarray(plan.tau), jnp.asarray(plan.told)
  every = Row(tau=tau[:-1], tau_next=tau[1:], told=told, told_next=jnp.concatenate([told[1:], told[-1:]]))
  return jax.tree.map(lambda leaf: leaf[piece], every)


def pieces(plan: Plan, boundary: float | None) -> list[tuple[int, slice]]:
  """Which expert walks which rows, in order: (0 or 1, rows).

  Expert 0 was trained on noise times from `boundary` up, expert 1 below. All frames of a row go to one expert, by the
  largest time that any frame is told, so that given frames leave the choice as it is. boundary: 0 or None where there
  is one expert. The plan must hold numbers, not tracers. Raises BadInput for a boundary outside [0, 1].
  From: Wan 2.2 (wan/image2video.py), whose boundaries are 0.9 (image-to-video) and 0.875 (text-to-video).
  """
  if not 0 <= (boundary or 0) <= 1:
    raise BadInput(f"the experts' boundary is a noise time in [0, 1], got {boundary:g}: Wan 2.2 has 0.9 or 0.875.")
  expert = np.where(np.asarray(plan.told).max(1) >= np.float32(boundary or 0), 0, 1)
  ends = [0, *(np.flatnonzero(np.diff(expert)) + 1).tolist(), len(expert)]
  return [(int(expert[start]), slice(start, end)) for start, end in pairwise(ends)]


def walk(velocity: Network, rows: Row, x: Latents, memory: Any, solver: Solver) -> tuple[Latents, Any]:
  """Some rows of a plan, one after the other: latents and the solver's memory before them -> those after.

  A plan may be cut anywhere and walked piece by piece, each by another network: the memory, which starts as
  solver.start(x), goes over the cut. velocity: as in `sample`.
  """
  batch, frames = x.shape[:2]

  def at(x: Latents, told: jax.Array) -> Latents:
    return velocity(x, jnp.broadcast_to(told, (batch, frames)))

  return jax.lax.scan(lambda carry, row: (solver.step(at, carry[0], row, carry[1]), None), (x, memory), rows)[0]


def sample(velocity: Network, plan: Plan, noise: Latents, clean: Latents, solver: Solver,
           held: Bool[Array, "b f h w 1"] | None = None) -> Latents:
  """Walks a plan from noise to clean latents.

  velocity: (latents, told) -> velocity, with parameters, condition and guidance bound. noise: standard normal. clean:
  what is given, in latent space; read where a frame starts below full noise and where `held`. held: True where the
  result must equal `clean` bit for bit, also inside frames that are otherwise made (regions).
  """
  x = begin(plan, noise, clean)
  x, _ = walk(velocity, rows(plan), x, solver.start(x), solver)
  return x if held is None else jnp.where(held, clean, x)
