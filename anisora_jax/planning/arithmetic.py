"""What a program computes, counted where it is traced, before any compiler changes it."""

import math
from typing import Any

import jax


def products(jaxpr: Any, turns: int = 1) -> int:
  """Multiply-adds x 2 of all matrix products of a jaxpr, loops multiplied out; those inside a kernel are not seen."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      ((summed, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
      total += 2 * turns * equation.outvars[0].aval.size * math.prod(left[dim] for dim in summed)
    times = turns * equation.params["length"] if equation.primitive.name == "scan" else turns
    for value in jax.tree.leaves(dict(equation.params), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += products(inner, times)
  return total
