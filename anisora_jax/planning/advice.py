"""Over how many devices the clips of each bucket are best split, and for what share of a step devices stand idle."""

from collections.abc import Sequence
from typing import NamedTuple

from anisora_jax.models.wan.sizes import Size
from anisora_jax.planning.microsteps import Cost, dealt, idle, plan

# Part of a device's kind -> bytes/s that it sends to its neighbours, one way, from the makers' data sheets: NVLink of
# H100 and H200, two links of a TPU's torus that an axis of the mesh uses. First match counts.
LINKS = {"H100 PCIe": 6.4e10, "H100": 4.5e11, "H200": 4.5e11, "A100": 3e11, "TPU v6": 1.8e11, "TPU v5 lite": 9e10,
         "TPU v5e": 9e10, "TPU v5": 1.8e11, "TPU v4": 9e10}
OF_PEAK, OF_LINK = 0.5, 0.75  # what programs reach of either; assumed where nothing was measured


class Clips(NamedTuple):
  """The batches of a bucket. degrees: how many devices may share a clip, and how many clips a batch then has."""

  name: str
  tokens: int
  degree: int
  degrees: dict[int, int]


class Advice(NamedTuple):
  """degree: the best one; batch: clips of a batch then; idle, now: share of the devices' time, so and as it is."""

  name: str
  degree: int
  batch: int
  idle: float
  now: float


def cost(size: Size, peak: float, link: float, exchanged: bool) -> Cost:
  """Of training a network in bf16. exchanged: heads are exchanged for tokens; else keys go round a ring.

  An exchange sends 8 arrays of width d a layer, forward and backward; a ring keys and values in both passes, in bf16,
  and their gradients, as if all in f32.
  """
  rate, sends = OF_PEAK * peak, OF_LINK * link
  square = 3 * 4.0 * size.layers * size.width
  none, one = (3 * size.forward_flops(1, tokens) for tokens in (0, 1))
  width = size.layers * size.width
  return Cost((one - none - square) / rate, square / rate, sent=16 * width / sends if exchanged else 0.0,
              turned=0.0 if exchanged else (4 + 4 + 8) * width / sends, fixed=none / rate)


def advise(buckets: Sequence[Clips], devices: int, cost: Cost) -> list[Advice]:
  """For each bucket the degree of least time a clip. devices: that share a batch."""
  found = []
  for name, tokens, degree, degrees in buckets:
    steps = {one: dealt([tokens] * batch, one, devices, cost) for one, batch in degrees.items()}
    best = min(steps, key=lambda one: (steps[one].seconds / degrees[one], one))
    found.append(Advice(name, best, degrees[best], idle([steps[best]], devices, cost),
                        idle([steps[degree]], devices, cost)))
  return found


def together(buckets: Sequence[Clips], devices: int, cost: Cost) -> float:
  """The idle share where clips of a batch of each bucket could be worked at once, as no single program does."""
  lengths = [tokens for _, tokens, degree, degrees in buckets for _ in range(degrees[degree])]
  degrees = sorted({one for bucket in buckets for one in bucket.degrees})
  return idle(plan(lengths, devices, degrees, cost), devices, cost)


def lines(buckets: Sequence[Clips], devices: int, cost: Cost) -> list[str]:
  """The advice, for people."""
  found = []
  for bucket, one in zip(buckets, advise(buckets, devices, cost), strict=True):
    better, now = f"better @{one.batch}/{one.degree}, where ", f"; now {one.now:.1%}"
    same = one.degree == bucket.degree
    found.append(f"{one.name}: {'as it is, ' if same else better}devices idle {one.idle:.1%} of a step"
                 f"{'' if same else now}")
  if len(buckets) > 1:
    found.append(f"were clips of all buckets worked at once: {together(buckets, devices, cost):.1%}")
  return found
