"""Named random streams.

A key is a function of (seed, step, purpose) and of nothing else, so no generator is carried or saved: a resumed run
draws what the uninterrupted run would have drawn, and a new purpose never disturbs an old one.
"""

import jax

# The number of a purpose is part of every run's randomness: append, never reorder.
PURPOSES = {name: number for number, name in enumerate(
  ["init", "task", "time", "noise", "drop", "heldout", "sample"])}


def key(seed: int, step: int | jax.Array, purpose: str) -> jax.Array:
  """The key of one purpose at one step. seed, step: integers, step may be traced. Raises KeyError for a new purpose."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), PURPOSES[purpose])


def per_sample(key: jax.Array, samples: jax.Array) -> jax.Array:
  """One key a sample from the samples' global numbers `[b]`, so that splitting a batch never changes a draw."""
  return jax.vmap(lambda sample: jax.random.fold_in(key, sample))(samples)
