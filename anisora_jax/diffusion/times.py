"""Which noise times to train on, and which to walk when sampling.

A time is a quantile u in [0, 1] pushed through a law and then shifted toward noise. In training a coin for each sample
decides whether its frames share one u or draw by a pattern of their own (probabilistic timestep sampling, PTSS: FVDM,
arXiv:2410.03160; Pusa, arXiv:2507.16116).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from anisora_jax.errors import BadInput, pick
from anisora_jax.shapes import Times


def shift_times(t: Float[Array, "*b"], shift: float) -> Float[Array, "*b"]:
  """Pushes noise times toward 1, where long and large videos need their steps.

  t: 0 clean .. 1 noise. shift: 1 keeps t; Wan takes 3 at 480p, 5 at 720p.
  From: Esser et al. 2024, arXiv:2403.03206, "resolution-dependent shifting".
  """
  # Not s t / (1 + (s - 1) t): in f32 that takes t = 1 to 1.0000001 for some shifts, and pure noise would not be pure.
  return shift * t / (shift * t + (1 - t))


def schedule(steps: int, shift: float, start: float = 1.0, end: float = 0.0) -> Float[Array, "{steps}+1"]:
  """The times to sample at, even before the shift, from `start` toward `end`, of which the last is 0 instead.

  Wan's own UniPC walks from 0.999 toward 0, that of diffusers from 1 toward 0.001.
  """
  if steps < 1:
    raise BadInput(f"{steps} sampling steps: take at least 1.")
  return shift_times(jnp.linspace(start, end, steps + 1).at[-1].set(0.0), shift)


def unshift_times(t: float, shift: float) -> float:
  """The time that `shift_times` takes to t."""
  return t / (t + shift * (1 - t))


Length = int | Int[Array, ""]  # of a sample, in frames

LAWS = {  # quantile u -> noise time, before the shift; and back
  "uniform": (lambda u: u, lambda t: t),
  "logit_normal": (lambda u: jax.nn.sigmoid(jax.scipy.special.ndtri(u)),
                   lambda t: jax.scipy.stats.norm.cdf(jax.scipy.special.logit(t))),
}


def _independent(key: Key[Array, ""], f: int, block: int, length: Length) -> Float[Array, "f"]:
  return jax.random.uniform(key, (f,))


def _blocks(key: Key[Array, ""], f: int, block: int, length: Length) -> Float[Array, "f"]:
  return jnp.repeat(jax.random.uniform(key, (-(-f // block),)), block)[:f]


def _monotone(key: Key[Array, ""], f: int, block: int, length: Length) -> Float[Array, "f"]:
  drawn = jax.random.uniform(key, (f,))
  return jnp.sort(jnp.where(jnp.arange(f) < length, drawn, 1.0))


def _rolling(key: Key[Array, ""], f: int, block: int, length: Length) -> Float[Array, "f"]:
  return jnp.minimum((jnp.arange(f) + jax.random.uniform(key)) / length, 1.0)


PATTERNS = {  # how the frames of one sample draw when they do not share a time; those from `length` on do not matter
  "independent": _independent,
  "blocks": _blocks,      # groups of `block` frames share (SkyReels-V2)
  "monotone": _monotone,  # later frames noisier
  "rolling": _rolling,    # an even ramp with a random offset (rolling diffusion)
}


@dataclass(frozen=True)
class TimeDraw:
  """The training distribution of noise times.

  per_frame: probability that the frames of a sample draw apart. From scratch 0.2; adapting a trained scalar model 1.
  late_per_frame: the same from step `late_from` on; never, unless that is set. law: in LAWS. pattern: in PATTERNS.
  block: frames of a group. low, high: the part of the distribution that is drawn from, in noise times after the shift:
  an expert learns only the times it will be asked at.
  """

  per_frame: float = 0.2
  late_per_frame: float = 0.2
  late_from: int = 2**31 - 1
  law: str = "uniform"
  shift: float = 1.0
  pattern: str = "independent"
  block: int = 1
  low: float = 0.0
  high: float = 1.0

  def __post_init__(self):
    pick(LAWS, self.law, "law of noise times")
    pick(PATTERNS, self.pattern, "pattern of noise times")
    for name in ("per_frame", "late_per_frame"):
      if not 0 <= getattr(self, name) <= 1:
        raise BadInput(f"{name} = {getattr(self, name)} is no probability: take 0 .. 1.")
    if self.late_from < 0:
      raise BadInput(f"late_from = {self.late_from} is no step: take 0 or more.")
    if self.shift <= 0 or self.block < 1:
      raise BadInput(f"shift {self.shift} and block {self.block} must be positive.")
    if not 0 <= self.low < self.high <= 1:
      raise BadInput(f"noise times from {self.low} to {self.high}: take 0 <= low < high <= 1.")

  def __call__(self, keys: Key[Array, "b"], f: int, step: Array | int, lengths: Int[Array, "b"] | None = None) -> Times:
    """One time a frame for each sample's key.

    lengths: frames of each sample, f by default; its times are those of a draw of so many, and what follows is noise.
    """
    p = jnp.where(step >= self.late_from, self.late_per_frame, self.per_frame)

    def one(key: Key[Array, ""], length: Length) -> Float[Array, "f"]:
      coin, together, apart = jax.random.split(key, 3)
      shared = jnp.broadcast_to(jax.random.uniform(together), (f,))
      return jnp.where(jax.random.bernoulli(coin, p), PATTERNS[self.pattern](apart, f, self.block, length), shared)

    return self.at(jax.vmap(one, (0, None if lengths is None else 0))(keys, f if lengths is None else lengths))

  def at(self, u: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The noise time at quantile u of the distribution of a single frame's time."""
    law, quantile = LAWS[self.law]
    if (self.low, self.high) != (0, 1):
      low, high = (quantile(unshift_times(t, self.shift)) for t in (self.low, self.high))
      u = low + u * (high - low)
    return shift_times(law(u), self.shift)
