"""Attention as devices share it, and what is true of it: how the tests of schemes make and compare it."""

from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from compare import apart
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from plain import softmax

from anisora_jax.models.attention import PATTERNS
from anisora_jax.parallel import mesh
from anisora_jax.parallel.sight import ALL, PADDED, Rule

# ulysses: of 8 devices each needs a head; hybrid, local_global: of 4 and 8, two exchange and the others ring.
HEADS = {"full": 3, "ring": 3, "ring_both": 3, "ulysses": 8, "hybrid": 6, "local_global": 2}
FRAMES, WIDTH = 5, 8
SEEN = {  # which frames each frame sees
  ALL: "11111 11111 11111 11111 11111",
  PADDED: "11111 11111 11111 11111 11111",
  Rule(causal=True): "10000 11000 11100 11110 11111",
  Rule(window=2): "11100 11110 11111 01111 00111",
  Rule(window=1, stride=3): "11010 11110 11110 10111 10011",
  Rule(causal=True, window=2): "10000 11000 11100 01110 00111",
  Rule(causal=True, window=1, stride=3): "10000 11000 11100 10110 10011",
}


def on(clip: int, seq: int) -> Mesh:
  return mesh.build({"clip": clip, "seq": seq}, count=clip * seq)


def seen(rule: Rule, frames: int) -> np.ndarray:
  """[f, f]; what pads a film is hidden by its ids."""
  table = np.ones((frames, frames), bool)
  table[:FRAMES, :FRAMES] = np.array([list(row) for row in SEEN[rule].split()]) == "1"
  return table


@lru_cache(maxsize=64)
def case(heads: int, clip: int, padded: int, lengths: tuple[int, ...], rule: Rule | None):
  """((q, k, v, do), ids, rule, what is true): of each length a clip that is only padded, and one packed of segments.

  Frames and their tokens are padded as the network pads them; where rules know no segments, the second clip's anywhere.
  rule: None for clips in which all see all, what pads too.
  """
  f, draw = FRAMES + -FRAMES % clip, np.random.default_rng(padded)
  ids = np.full((2 * len(lengths), f, padded), -1, np.int32)
  for at, length in enumerate(lengths):
    drawn = draw.integers(0, 3, (FRAMES, length))
    ids[2 * at, :FRAMES, :length] = 0
    ids[2 * at + 1, :FRAMES, :length] = drawn if rule is None or rule.packed else np.minimum(drawn, 1) - 1
  ids = np.zeros_like(ids) if rule is None else ids
  arrays = tuple(draw.normal(size=(*ids.shape, heads, WIDTH)).astype(np.float32) for _ in range(4))
  asked = ALL if rule is None else rule  # a rule without frames is false
  return arrays, None if rule is None else ids, asked, softmax(*arrays, ids, seen(asked, f))


def attend(pattern: str, there: Mesh, kernel: str, arrays, ids, rule: Rule = ALL):
  """(attention, its gradients), which wait until attention is done: on simulated devices their hops could overtake."""
  *arrays, do = arrays
  o, back = jax.vjp(lambda *parts: PATTERNS[pattern](*parts, ids, there, kernel, rule), *arrays)
  return o, *_after(o.sum(), back)(_after(o.sum(), do))


def _after(known: jax.Array, arrays):
  """Those of a tree that hold real numbers, when a number is known."""
  def late(x):
    return jnp.where(jnp.isnan(known), jnp.nan, x).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(late, arrays)


def _one_after_another(pattern, there, kernel, given):
  """No case may start before the last one is done: on simulated devices its collectives could overtake."""
  made, known = [], 0.0
  for arrays, ids, rule in given:
    made.append(attend(pattern, there, kernel, _after(known, arrays), ids, rule))
    known = sum(x.sum() for x in made[-1])
  return made


def assert_softmax(pattern: str, there: Mesh, kernel: str, cases: Sequence) -> str:
  """Values and gradients of all cases, in one program; its compiled text."""
  given = [(arrays, ids, rule) for arrays, ids, rule, _ in cases]
  split, whole = NamedSharding(there, P(None, "clip", "seq")), NamedSharding(there, P())
  placed = [((split,) * 4, None if ids is None else whole, rule) for _, ids, rule in given]
  run = jax.jit(partial(_one_after_another, pattern, there, kernel), in_shardings=(placed,), out_shardings=split)
  compiled = run.lower(given).compile()
  for made, (_, ids, rule, true) in zip(compiled(jax.device_put(given, placed)), cases, strict=True):
    for name, got, want in zip(("o", "dq", "dk", "dv"), made, true, strict=True):
      assert apart(np.reshape(got, want.shape), want) < (1e-5 if name == "o" else 1e-4), (name, got.shape, ids, rule)
  return compiled.as_text()
