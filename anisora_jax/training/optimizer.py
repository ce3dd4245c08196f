"""One optax chain: clip by global norm, AdamW with decay on kernels only, a schedule, frozen parts; and the average.

    g <- g min(1, clip / |g|)            m <- b1 m + (1-b1) g            v <- b2 v + (1-b2) g^2
    p <- p - rate(n) (m/(1-b1^n) / (sqrt(v/(1-b2^n)) + eps) + decay p)

From: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from anisora_jax.errors import BadInput, pick

Count = int | Int[Array, ""]  # updates made before this one
Rate = Callable[[Count], Float[Array, ""]]  # -> learning rate of this one


@dataclass(frozen=True)
class Optimizer:
  """rate: the peak. warmup: updates until it is reached. steps: where cosine and wsd end, at `final` times the peak.

  cooldown: the last share of the steps, in which wsd goes down. decay: off biases, norms and modulation. clip: the
  largest global norm of the trainable gradients. frozen: a regular expression searched in parameter paths ("text/",
  "blocks/attention/q/kernel"); "" freezes nothing. ema: the limit of the average's decay.
  """

  rate: float = 1e-4
  warmup: int = 0
  steps: int = 1
  schedule: str = "constant"
  final: float = 0.0
  cooldown: float = 0.2
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  decay: float = 1e-4
  clip: float = 1.0
  frozen: str = ""
  ema: float = 0.9999

  def __post_init__(self):
    pick(SCHEDULES, self.schedule, "schedule")
    rules = {"rate": (0 < self.rate < math.inf, "above 0"), "warmup": (self.warmup >= 0, "0 or more"),
             "steps": (self.steps >= 1, "1 or more"), "final": (0 <= self.final <= 1, "0 .. 1"),
             "cooldown": (0 < self.cooldown <= 1, "above 0, at most 1"),
             "b1": (0 <= self.b1 < 1, "0 or more and below 1"), "b2": (0 <= self.b2 < 1, "0 or more and below 1"),
             "eps": (0 < self.eps < math.inf, "above 0"), "decay": (0 <= self.decay < math.inf, "0 or more"),
             "clip": (self.clip > 0, "above 0 (inf never clips)"), "ema": (0 <= self.ema <= 1, "0 .. 1")}
    for name, (right, allowed) in rules.items():
      if not right:
        raise BadInput(f"optimizer.{name} is {getattr(self, name)!r}: it must be {allowed}.")
    if self.schedule == "cosine" and self.warmup >= self.steps:
      raise BadInput(f"optimizer.warmup is {self.warmup} of {self.steps} steps: a cosine needs some after it.")
    try:
      re.compile(self.frozen)
    except re.error as error:
      raise BadInput(f"optimizer.frozen is {self.frozen!r}, which is no regular expression: {error}.") from None


def constant(options: Optimizer, n: Count) -> Float[Array, ""]:
  return jnp.float32(options.rate)


def cosine(options: Optimizer, n: Count) -> Float[Array, ""]:
  done = jnp.clip((n - options.warmup) / (options.steps - options.warmup), 0, 1)
  return options.rate * (options.final + (1 - options.final) * (1 + jnp.cos(jnp.pi * done)) / 2)


def wsd(options: Optimizer, n: Count) -> Float[Array, ""]:
  """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): the peak, then linearly down over the cooldown."""
  done = jnp.clip((n / options.steps - 1) / options.cooldown + 1, 0, 1)
  return options.rate * (1 - (1 - options.final) * done)


def rate_of(options: Optimizer) -> Rate:
  """Linear from rate/warmup to rate over the first `warmup` updates, then the schedule; no update has rate 0."""
  def rate(n: Count) -> Float[Array, ""]:
    warm = jnp.minimum(1.0, (n + 1) / max(options.warmup, 1))
    return warm * SCHEDULES[options.schedule](options, n)
  return rate


def path_of(path: tuple) -> str:
  """A jax key path as "blocks/attention/q/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def decayed(params: PyTree) -> PyTree:
  """True where weights decay: kernels. Norms, biases and modulation have other names."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).split("/")[-1] == "kernel", params)


def build(options: Optimizer, params: PyTree) -> tuple[optax.GradientTransformation, Rate]:
  """The optimiser and its learning rate as a function of the updates made before, for reporting.

  params: the parameters or their shapes. Frozen leaves have no moments, do not count in the norm and never change.
  Raises BadInput if `frozen` meets no parameter, or all of them.
  """
  rate = rate_of(options)
  chain = optax.chain(
    optax.clip_by_global_norm(options.clip),
    optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.decay, mask=decayed),
  )
  if not options.frozen:
    return chain, rate
  labels = jax.tree_util.tree_map_with_path(
    lambda path, _: "frozen" if re.search(options.frozen, path_of(path)) else "trained", params)
  kinds = set(jax.tree.leaves(labels))
  if len(kinds) == 1:
    raise BadInput(f"optimizer.frozen is {options.frozen!r}, which meets {'every' if 'frozen' in kinds else 'no'} "
                   f"parameter: change it, or leave it empty to train all.")
  return optax.multi_transform({"trained": chain, "frozen": optax.set_to_zero()}, labels), rate


def ema(average: PyTree, params: PyTree, n: Count, limit: float = 0.9999) -> PyTree:
  """The moving average after its update number n (from 0): decay min(limit, (1+n)/(10+n)), so that it starts fast."""
  decay = jnp.minimum(limit, (1 + n) / (10 + n))
  # The cast: a traced decay would turn a leaf of few bits into f32, and with it the state's type.
  return jax.tree.map(lambda a, p: (a + (1 - decay) * (p - a)).astype(a.dtype), average, params)


SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}  # name in configs -> share of the peak at an update
