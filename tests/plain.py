"""Attention with nothing clever, in f64, and what a traced program sends: witnesses of the tests of attention."""

import math
import re
from collections import Counter

import jax
import numpy as np


def softmax(q, k, v, do, ids, frames) -> list[np.ndarray]:
  """Output and gradients, [b, l, a, k]. ids: [b, f, n], those of equal number meet. frames: [f, f], who sees whom."""
  n = ids.shape[2]
  q, k, v, do = (x.astype(np.float64).reshape(len(x), -1, *x.shape[-2:]).swapaxes(1, 2) for x in (q, k, v, do))
  ids, scale = ids.reshape(len(ids), -1), 1 / np.sqrt(q.shape[-1])
  seen = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None] & frames.repeat(n, 0).repeat(n, 1)
  weights = np.where(seen[:, None], np.exp(q @ k.mT * scale), 0.0)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
  slope = do @ v.mT
  dlogits = weights * (slope - np.sum(weights * slope, -1, keepdims=True)) * scale
  return [x.swapaxes(1, 2) for x in (weights @ v, dlogits @ k, dlogits.mT @ q, weights.mT @ do)]


def inner(equation) -> list:
  """The programs inside an operation."""
  found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
  return [x for x in (getattr(x, "jaxpr", x) for x in found) if hasattr(x, "eqns")]


def operations(equation) -> set[str]:
  """Names, its own and of all inside."""
  return {equation.primitive.name}.union(*(operations(x) for part in inner(equation) for x in part.eqns))


def sends(jaxpr, times: int = 1) -> Counter:
  """{(from, to): bytes} of permutes, {"exchanged", "gathered": bytes a device sends}; traced, loops multiplied."""
  found = Counter()
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    size = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in equation.invars if hasattr(x.aval, "dtype"))
    if name == "ppermute":
      found.update(dict.fromkeys(params["perm"], times * size))
    elif name == "all_to_all":
      group = len(params["axis_index_groups"][0])
      found["exchanged"] += times * size * (group - 1) // group
    elif name == "all_gather":
      found["gathered"] += times * size * (params["axis_size"] - 1)
    elif name == "reduce_scatter":
      found["gathered"] += times * size * (params["axis_size"] - 1) // params["axis_size"]
    else:
      assert not re.search("psum|all_gather|reduce_scatter", name), name
    for part in inner(equation):
      found.update(sends(part, times * params["length"] if name == "scan" else times))
  return found
