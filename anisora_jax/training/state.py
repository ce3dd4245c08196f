"""Everything that a training step changes, and nothing else: the pytree that is checkpointed."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


@flax.struct.dataclass
class TrainState:
  """step: how many steps are behind, int32 []; params, ema: f32, of one structure; opt: moments and counts.

  No shapes in the types: trees of shardings, of shapes and of `...` have this form too.
  """

  step: PyTree
  params: PyTree
  ema: PyTree
  opt: PyTree


def create(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step. The averaged parameters start as a copy of the parameters."""
  # A copy: the step donates its state, and one buffer cannot be given away twice.
  return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
