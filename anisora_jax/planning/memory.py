"""What a training step takes of a device's memory, by formulas: known at once, where a compiler takes minutes.

  kept    parameters, moments, average, frozen base and batch: what the shards weigh, to the byte
  worked  gradients + layers x saved u + (wide + hidden r) u + near + layouts + gathered kernels + logits
with u the bytes of this device's tokens in one array [b, f, n, width], and r the MLP's hidden units over the width:
  saved     arrays of u that a layer keeps for its backward pass, as its rematerialisation policy says
  wide      arrays of u, and hidden of r u, that lie beside one another where the most do: in the backward pass of the
            MLP, when the layer's forward pass has been done again
  near      keys and values that a local pattern gathers of other devices, and their gradients, f32
  layouts   kernels of the MLP once more, f32 shards in another order than that in which gradients come
  gathered  layers whose kernels are whole on the device at once, those that are worked and those that are on their way
Wide, hidden, layouts and gathered were fitted to what XLA (jaxlib 0.10.2) says of seven steps of 14B I2V in bf16 for
H200 and one for v5p; the rest follows from the program. On nine more for H200 (8 to 32 cards, seq and tensor 1 and 2,
all of 14B and adapters, 9 to 21 latent frames, 480p and 720p, on the device and on the host) the whole is off by 6.9 %
at most, and by 1.9 % in the median. On 64 v5p at 720p, seq 4, it is off by 2.1 %.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from anisora_jax.models.kernels import LOGITS, LOGITS_ELSEWHERE, SIDE, SIDE_ELSEWHERE
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import targets


class Fit(NamedTuple):
  """Of a platform, as above."""

  wide: float
  hidden: float
  layouts: float
  gathered: float


FITS = {"gpu": Fit(21.0, 5.0, 1.0, 1.3), "tpu": Fit(21.0, 5.0, 1.7, 2.0), "cpu": Fit(24.0, 6.0, 1.0, 2.0)}


class Saved(NamedTuple):
  """Arrays of u that a layer keeps: on the device, the same in r u, and on its host.

  fewer: arrays of u less beside one another, which are copies out of a stack that is not there.
  """

  device: float
  hidden: float = 0.0
  host: float = 0.0
  fewer: float = 0.0


SAVED = {  # name of a policy -> what it keeps; an attention's log-sum-exp is added where there is one
  "none": Saved(57, 6),              # fitted; all else is counted
  "attention": Saved(2),             # the layer's input, and what self-attention gives
  "attention_offload": Saved(1, host=1),
  "matmuls": Saved(8, 1),            # its input, q k v o, q o of cross-attention, the MLP's end; its middle
  "full": Saved(1),
  "full_offload": Saved(0, host=1, fewer=3),
  "offload": Saved(0, host=2, fewer=3),
}
NAMED = ("attention", "attention_offload", "offload")  # those that keep the log-sum-exp too


@dataclass(frozen=True)
class Work:
  """A step as one device sees it.

  tokens: of the device in one micro-batch, padding included; keys: that each of them sees at once;
  itemsize: bytes of a number in arithmetic; tensor: devices that split heads and hidden units; split: that split
  weights besides; whole: all parameters are trained, not adapters; near: tokens of others whose keys are gathered.
  """

  size: Size
  tokens: int
  keys: int
  itemsize: int
  remat: str
  kernel: str
  platform: str
  tensor: int = 1
  micro_batches: int = 1
  whole: bool = True
  near: int = 0

  @property
  def array(self) -> float:
    """u, in bytes."""
    return float(self.tokens * self.size.width * self.itemsize)

  @property
  def ratio(self) -> float:
    """r on this device."""
    return self.size.mlp / self.size.width / self.tensor

  @property
  def sums(self) -> float:
    """Bytes of the log-sum-exp of a layer."""
    return 4.0 * self.tokens * self.size.heads / self.tensor if self.remat in NAMED else 0.0


class Estimate(NamedTuple):
  """Bytes of a device by what they are for: kept through the step, and beside it at most. host: of its host."""

  kept: Mapping[str, float]
  worked: Mapping[str, float]
  host: float

  @property
  def total(self) -> float:
    return sum(self.kept.values()) + sum(self.worked.values())


def held(tree: PyTree) -> int:
  """Bytes of a tree's shards on one device."""
  return sum(map(targets.held, jax.tree.leaves(tree)))


def logits(work: Work) -> float:
  """Bytes of them that our own kernels make at once: all where attention is dense, a few tiles where it is not."""
  tiles = LOGITS.get(work.platform, LOGITS_ELSEWHERE), SIDE.get(work.platform, SIDE_ELSEWHERE)
  most, side = {"dense": (math.inf, work.keys), "blockwise": tiles}.get(work.kernel, (0, 0))
  return 8.0 * min(most, work.tokens * min(side, work.keys) * work.size.heads / work.tensor)  # they and their gradient


def near(work: Work) -> float:
  """Bytes of keys and values of others, and of their gradients in f32."""
  return 2.0 * (work.itemsize + 4) * work.near * work.size.width / work.tensor


def saved(work: Work) -> float:
  """Bytes that all layers keep on the device for the backward pass."""
  kept = SAVED[work.remat]
  return work.size.layers * ((kept.device + kept.hidden * work.ratio) * work.array + (0 if kept.host else work.sums))


def on_host(work: Work) -> float:
  """Bytes that they keep on its host."""
  kept = SAVED[work.remat]
  return work.size.layers * (kept.host * work.array + (work.sums if kept.host else 0))


def estimate(work: Work, state: PyTree, batch: PyTree, base: PyTree, aside: bool) -> Estimate:
  """state: of training.state, batch: what a step takes, base: what it only reads; trees of shapes with shardings.

  aside: moments and the average live on the host.
  """
  fit, fewer, size = FITS[work.platform], SAVED[work.remat].fewer, work.size
  moments, average, gradients = held(state.opt), held(state.ema), held(state.params)
  kept = {"parameters": gradients + held(state.step), "moments": 0 if aside else moments,
          "average": 0 if aside else average, "base": held(base), "batch": held(batch)}
  layer = layer_kernels(size) / work.tensor
  mlp = 2 * size.width * size.mlp / layer_kernels(size) if work.whole else 0.0
  worked = {
    "gradients": gradients * (2 if work.micro_batches > 1 else 1),
    "saved": saved(work),
    "one layer": (fit.wide - fewer + fit.hidden * work.ratio) * work.array + near(work) + logits(work),
    "its kernels": fit.gathered * layer * work.itemsize + fit.layouts * mlp * gradients}
  if aside and gradients + moments + average > sum(worked.values()):  # while parameters change
    worked = {"gradients": gradients, "moments and average": moments + average}
  return Estimate(kept, worked, on_host(work) + (moments + average if aside else 0))


def layer_kernels(size: Size) -> int:
  """Numbers in the kernels of one layer."""
  attention = 8 + (2 if size.image_width else 0)
  return attention * size.width**2 + 2 * size.width * size.mlp


def describe(found: Estimate) -> str:
  """One line for people."""
  parts = ", ".join(f"{size / 2**20:.1f} {name}" for name, size in {**found.kept, **found.worked}.items() if size)
  host = f"; {found.host / 2**20:.1f} MiB of its host's" if found.host else ""
  return f"{found.total / 2**20:.1f} MiB a device by formula: {parts}{host}"
