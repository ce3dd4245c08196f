"""One row of sampling: latents at tau[r] -> latents at tau[r+1], every frame at its own time.

The path is x(t) = (1-t) x0 + t eps, so the network's velocity is v = dx/dt and x0 = x - t v. A solver is a pair of
pure functions, `start(x) -> memory` and `step(velocity, x, row, memory) -> (x, memory)`, whose memory is a pytree that
a scan carries. In all of them a frame with tau[r+1] == tau[r] stays as it is, bit for bit, and leaves its memory alone,
so a frame may wait, move and rest on its own clock.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anisora_jax.shapes import Latents

Clocks = Float[Array, "f"]                               # one number a frame
Velocity = Callable[[Latents, Clocks], Latents]          # (latents, what the network is told) -> velocity


@flax.struct.dataclass
class Row:
  """What a solver knows of one row (or of all, stacked): each frame's time now and next, what is told now and next."""

  tau: Float[Array, "*r f"]
  tau_next: Float[Array, "*r f"]
  told: Float[Array, "*r f"]
  told_next: Float[Array, "*r f"]


class Solver(NamedTuple):
  """start: latents -> memory.  step: velocity, latents, row, memory -> latents, memory."""

  start: Callable[[Latents], Any]
  step: Callable[[Velocity, Latents, Row, Any], tuple[Latents, Any]]


def _wide(clock: Float[Array, "f"] | Bool[Array, "f"]) -> Float[Array, "f 1 1 1"] | Bool[Array, "f 1 1 1"]:
  return clock[:, None, None, None]


def _nothing(x: Latents) -> tuple[()]:
  return ()


def _euler_step(velocity: Velocity, x: Latents, row: Row, memory: tuple[()]) -> tuple[Latents, tuple[()]]:
  """First order: along the velocity of this row. One network call."""
  moved = x + _wide(row.tau_next - row.tau) * velocity(x, row.told)
  return jnp.where(_wide(row.tau_next < row.tau), moved, x), memory


def _heun_step(velocity: Velocity, x: Latents, row: Row, memory: tuple[()]) -> tuple[Latents, tuple[()]]:
  """Second order: along the mean of the velocities here and where Euler lands. Two network calls.

  A frame that lands at time 0 takes the Euler step: there the velocity is pure guesswork (it holds the noise, of which
  nothing is left). A row in which every frame lands or rests makes no second call.
  """
  width, moves = _wide(row.tau_next - row.tau), _wide(row.tau_next < row.tau)
  here = velocity(x, row.told)
  landed = jnp.where(moves, x + width * here, x)

  def mean_of_both():
    there = velocity(landed, row.told_next)
    return jnp.where(moves & _wide(row.tau_next > 0), x + width * (here + there) / 2, landed)

  return jax.lax.cond(jnp.any((row.tau_next < row.tau) & (row.tau_next > 0)), mean_of_both, lambda: landed), memory


@flax.struct.dataclass
class Memory:
  """What UniPC remembers: for each frame, its own last two moves.

  moves: how many the frame has made. x: latents that its last move left from. clean, clean_before: the clean latents
  predicted at its last move and at the one before, at the times tau and tau_before.
  """

  moves: Int[Array, "f"]
  x: Latents
  clean: Latents
  clean_before: Latents
  tau: Clocks
  tau_before: Clocks


def _unipc_start(x: Latents) -> Memory:
  never = jnp.zeros(x.shape[1], jnp.float32)
  return Memory(moves=jnp.zeros(x.shape[1], jnp.int32), x=x, clean=x, clean_before=x, tau=never, tau_before=never)


def _log_snr(tau: Clocks) -> Clocks:
  """log((1-t) / t), finite also at the ends."""
  tau = jnp.clip(tau, 1e-8, 1 - 1e-6)
  return jnp.log1p(-tau) - jnp.log(tau)


def _toward(x: Latents, clean: Latents, tau: Clocks, tau_next: Clocks) -> Latents:
  """The point at tau_next of the line from x at time tau to `clean` at time 0; at time 0 exactly `clean`."""
  keep = _wide(tau_next / tau)
  return keep * x + (1 - keep) * clean


def _corrector_weights(h: Clocks, r: Clocks, second: Bool[Array, "f"]) -> tuple[Clocks, Clocks]:
  """Weights of the two clean-latent differences in UniC with B(h) = expm1(-h).

  h: rise of log-SNR over the move, > 0.  r: log-SNR of the move before relative to h, < 0.  second: order 2, else 1.
  Solves rho1 + rho2 = b1, r rho1 + rho2 = b2 with b1 = g1 / B, b2 = 2 g2 / B, g1 = B/z - 1, g2 = g1/z - 1/2, z = -h.
  """
  z = -h
  # The differences cancel in f32 for small z; the series is exact to f32 there.
  safe = jnp.where(h < 0.3, -1.0, z)
  series1 = z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
  series2 = z / 6 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7))))
  g1 = jnp.where(h < 0.3, series1, jnp.expm1(safe) / safe - 1)
  g2 = jnp.where(h < 0.3, series2, (jnp.expm1(safe) / safe - 1) / safe - 0.5)
  b1, b2 = g1 / jnp.expm1(z), 2 * g2 / jnp.expm1(z)
  before = (b1 - b2) / (1 - r)
  return jnp.where(second, before, 0.0), jnp.where(second, b1 - before, 0.5)


def _unipc_step(velocity: Velocity, x: Latents, row: Row, memory: Memory) -> tuple[Latents, Memory]:
  """Second order predictor, third order corrector, on predicted clean latents. One network call.

  The corrector redoes a frame's last move with the clean latents predicted after it, from its second move on. The move
  onto time 0 is of first order and lands on the predicted clean latents exactly.
  From: Zhao et al. 2023, UniPC, arXiv:2302.04867, with B(h) = expm1(h), order 2, in the form that Wan samples with.
  """
  moves, lands = row.tau_next < row.tau, row.tau_next == 0
  once, twice = memory.moves > 0, memory.moves > 1
  # Where a frame rests, or has no past, harmless numbers stand in: they are dropped below and must not breed nan.
  tau, tau_next = jnp.where(moves, row.tau, 0.5), jnp.where(moves, row.tau_next, 0.25)
  last = jnp.where(once, memory.tau, tau)
  now, before = _log_snr(tau), _log_snr(last)
  clean = x - _wide(tau) * velocity(x, row.told)

  h = jnp.where(now > before, now - before, 1.0)
  r = jnp.where(twice, (_log_snr(memory.tau_before) - before) / h, -1.0)
  rho_before, rho_now = _corrector_weights(h, r, twice)
  change = _wide(rho_before / r) * (memory.clean_before - memory.clean) + _wide(rho_now) * (clean - memory.clean)
  corrected = _toward(memory.x, memory.clean + change, last, tau)
  corrected = jnp.where(_wide(once), corrected, x)

  slope = jnp.where(once & ~lands, (_log_snr(tau_next) - now) / (2 * h), 0.0)
  moved = _toward(corrected, clean + _wide(slope) * (clean - memory.clean), tau, tau_next)

  after = Memory(moves=memory.moves + 1, x=corrected, clean=clean, clean_before=memory.clean,
                 tau=tau, tau_before=memory.tau)

  def if_moving(new, old):
    return jnp.where(moves if new.ndim == 1 else _wide(moves), new, old)

  return if_moving(moved, x), jax.tree.map(if_moving, after, memory)


euler = Solver(_nothing, _euler_step)
heun = Solver(_nothing, _heun_step)
unipc = Solver(_unipc_start, _unipc_step)

SOLVERS = {"euler": euler, "heun": heun, "unipc": unipc}  # name in configs -> solver
