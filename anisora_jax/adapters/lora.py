"""Low-rank adapters on any parameter path: begin, join, scale, fold.

An adapter of a layer is what stands beside its arrays: `lora_a` [.., i, r] and `lora_b` [.., r, o] beside a kernel
[.., i, o], and `NAME_diff` beside any array NAME, which some published adapters bring. The network that they make is
  kernel + scale lora_a lora_b,  NAME + NAME_diff
Layers that are stacked on axis 0 have stacked adapters. From: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from anisora_jax.errors import BadInput

DIFF = "_diff"


@dataclass(frozen=True)
class Lora:
  """rank: r. alpha: scale = alpha / rank. where: a regular expression searched in the paths of kernels."""

  rank: int = 16
  alpha: float = 16.0
  where: str = r"blocks/(\w+_attention/[qkvo]|mlp/(up|down))/"

  def __post_init__(self):
    if self.rank < 1 or not 0 < self.alpha < math.inf:
      raise BadInput(f"lora.rank is {self.rank} and lora.alpha {self.alpha}: both must be above 0.")
    try:
      re.compile(self.where)
    except re.error as error:
      raise BadInput(f"lora.where is {self.where!r}, which is no regular expression: {error}.") from None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def begin(lora: Lora, params: PyTree, key: Array) -> PyTree:
  """Adapters that change nothing yet: lora_a uniform within 1/sqrt(i), lora_b zeros, f32.

  params: the base, or its shapes. Raises BadInput if `where` meets no kernel.
  """
  flat = flatten_dict(params, sep="/")
  kernels = [path for path in flat if path.endswith("/kernel") and re.search(lora.where, path)]
  if not kernels:
    raise BadInput(f"lora.where is {lora.where!r}, which meets no kernel: take words of paths such as "
                   f"{next(path for path in flat if path.endswith('/kernel'))}.")
  made = {}
  for number, path in enumerate(sorted(kernels)):
    *stack, i, o = flat[path].shape
    layer, bound = path.removesuffix("/kernel"), i**-0.5
    drawn = jax.random.uniform(jax.random.fold_in(key, number), (*stack, i, lora.rank), minval=-bound, maxval=bound)
    made |= {f"{layer}/lora_a": drawn, f"{layer}/lora_b": jnp.zeros((*stack, lora.rank, o))}
  return unflatten_dict(made, sep="/")


def join(base: Mapping, adapters: Mapping) -> dict:
  """One tree in which adapters stand beside what they adapt; nothing is computed."""
  return {**base, **{name: join(base[name], part) if name in base and isinstance(part, Mapping) else part
                     for name, part in adapters.items()}}


def scaled(params: Mapping, scale: float) -> dict:
  """A joined tree whose adapters count `scale` times, for a network that adds x lora_a lora_b itself."""
  return {name: scaled(x, scale) if isinstance(x, Mapping) else scale * x if name == "lora_b" else x
          for name, x in params.items()}


def fold(params: Mapping, scale: float) -> dict:
  """A joined tree -> the parameters that the network uses, in the base's dtypes. Also of one layer of a stack."""
  def added(name: str, x):
    more = []
    if name == "kernel" and "lora_a" in params:
      more.append(scale * jnp.matmul(params["lora_a"], params["lora_b"]))
    if name + DIFF in params:
      more.append(params[name + DIFF])
    return sum([x.astype(jnp.float32), *more]).astype(x.dtype) if more else x

  extra = {"lora_a", "lora_b", *(name for name in params if name.endswith(DIFF))}
  return {name: fold(x, scale) if isinstance(x, Mapping) else added(name, x)
          for name, x in params.items() if name not in extra}


def merge(base: Mapping, adapters: Mapping, scale: float) -> dict:
  """The base with its adapters added, of the base's structure and dtypes."""
  return fold(join(base, adapters), scale)
