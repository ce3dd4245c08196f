"""What each frame's noise time is at every row of sampling, and what the network is told.

A task is a plan: a column that is zero throughout is a given frame, a column `m sigma` a frame that is given softly,
and `sigma` itself a frame to make. All arrays are leaves, so one compilation serves every plan of one size.
"""

import flax.struct
import numpy as np
from jaxtyping import Array, Float

from anisora_jax.errors import BadInput

Column = Float[np.ndarray, "f"] | Float[Array, "f"]


@flax.struct.dataclass
class Plan:
  """The walk of f frames from noise to clip in r rows.

  tau: noise time of each frame before row 0, after row 0, ...; 0 clean .. 1 noise; no column rises, each ends at 0.
  told: the time the network is told at each row (equal to tau[:-1] unless a method says otherwise).
  start: share of noise in the first latents. It is tau[0], but 1 for a free frame of a schedule that starts below 1:
    such a schedule still begins with pure noise.
  """

  tau: Float[np.ndarray, "rows f"] | Float[Array, "rows f"]
  told: Float[np.ndarray, "r f"] | Float[Array, "r f"]
  start: Column


def _refuse(tau: Float[np.ndarray, "rows f"]) -> None:
  """Raises BadInput for a walk that is too short, leaves [0, 1], rises or does not end clean."""
  if len(tau) < 2:
    raise BadInput(f"a sampling plan of {len(tau)} noise times has no step: give at least 2, for example [1, 0].")
  if not ((tau >= 0) & (tau <= 1)).all():  # also catches nan
    raise BadInput(f"noise times of a sampling plan lie in [0, 1], got {tau.min():g} .. {tau.max():g}.")
  rises = np.argwhere(np.diff(tau, axis=0) > 0)
  if len(rises):
    row, frame = rises[0]
    raise BadInput(f"the noise time of frame {frame} rises at row {row} from {tau[row, frame]:g} to "
                   f"{tau[row + 1, frame]:g}: sampling only takes noise away, give times that fall or stay.")
  if tau[-1].any():
    frame = int(tau[-1].argmax())
    raise BadInput(f"frame {frame} ends at noise time {tau[-1, frame]:g}: a sampling plan must end at 0.")


def sync(sigmas: Float[np.ndarray, "rows"] | Float[Array, "rows"], multiplier: Column, whole: bool = False) -> Plan:
  """All frames walk one schedule, each scaled by its own multiplier.

  sigmas: noise times of the shared schedule, falling to 0. multiplier: 1 makes the frame, 0 keeps it as given bit for
  bit, between the two the frame starts from its given latents under that share of noise and may change. whole: tell the
  network whole thousandths, rounded down, 0.999 at most, as a model trained on the timesteps 0 .. 999 was told; the
  solver still moves by the exact times. Wan's UniPC does so.
  Raises BadInput for times or multipliers outside [0, 1], and for times that rise or do not end at 0.
  From: Liu et al. 2025, Pusa, arXiv:2507.16116.
  """
  sigmas, multiplier = np.asarray(sigmas, np.float32), np.asarray(multiplier, np.float32)
  if not ((multiplier >= 0) & (multiplier <= 1)).all():
    raise BadInput(f"a frame's noise multiplier lies between 0 (given) and 1 (made), got {multiplier.tolist()}.")
  _refuse(sigmas[:, None])
  tau = sigmas[:, None] * multiplier[None]
  told = tau[:-1]
  if whole:
    told = np.minimum(np.floor(1000 * told), 999) / 1000
  return Plan(tau=tau, told=told, start=np.where(multiplier == 1, np.float32(1), tau[0]))


PLANS = {"sync": sync}  # name in configs -> function
