"""The text encoder of the small configs: one fixed random vector a word, no weights.

Equal words get equal vectors on every machine, so a small transformer can learn what the words of its captions mean.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float


@lru_cache(maxsize=65536)
def _vector(word: str, width: int) -> Float[np.ndarray, "e"]:
  seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
  return np.random.Generator(np.random.Philox(seed)).standard_normal(width, dtype=np.float32)


@dataclass(frozen=True)
class Words:
  """tokens: words kept of a caption, the rest is cut; width: of a word's vector."""

  tokens: int
  width: int

  def __call__(self, captions: Sequence[str], mesh: Mesh | None = None) -> Float[np.ndarray, "b s e"]:
    """Captions -> text tokens, rows of zeros after the last word, on any mesh. An empty caption is all zeros."""
    text = np.zeros((len(captions), self.tokens, self.width), np.float32)
    for row, caption in zip(text, captions, strict=True):
      for token, word in zip(row, re.findall(r"\w+", caption.lower()), strict=False):
        token[:] = _vector(word, self.width)
    return text
