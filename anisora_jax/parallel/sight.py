"""Which tokens see which: by the segment and the frame of each.

A rule is static and the same for all tokens; what differs between them are two numbers each, which weigh little.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from anisora_jax.errors import BadInput

FAR = 2**29  # beyond every frame and segment; the difference of two is still an int32


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rule:
  """Of which frames of its film a token sees the tokens; by default of all.

  causal: of its own and of earlier ones. window: of those at most so many frames away. stride: beside a window, also of
  frames 0, stride, 2 stride and so on. All that are given hold at once. packed: clips may share a row; where none do,
  segments tell only of padding, and the others are all equal.
  """

  causal: bool = False
  window: int | None = None
  stride: int | None = None
  packed: bool = True

  def __bool__(self) -> bool:
    """Whether frames matter."""
    return self.causal or self.window is not None

  def joins(self, queries, keys):
    """Whether tokens of frames `queries` see those of frames `keys`, which broadcast."""
    apart = queries - keys
    near = abs(apart) <= (FAR if self.window is None else self.window)
    if self.stride is not None:
      near = near | (keys % self.stride == 0)
    return near & (apart >= 0) if self.causal else near

  def share(self, frames: int) -> float:
    """How much of a film of so many frames a token sees, on average."""
    return float(self.joins(*np.ogrid[:frames, :frames]).mean())


ALL, PADDED = Rule(), Rule(packed=False)  # all that are known are seen: of the same clip, of the only one


def parse(text: str, frames: int) -> Rule:
  """A rule as configs write it, for films of so many frames; parts are joined by "+".

  "all"; "causal"; "window:24", so many frames to each side; "window:24+globals:16", also up to 16 frames that are
  spread evenly over the film (Tan et al. 2024, arXiv:2406.16260, give 24 of both). Raises BadInput.
  """
  found = {part: number and int(number) for part, number in re.findall(r"(\w+)(?::(\d+))?(?:\+|$)", text)}
  known = [r"all", r"causal", r"(causal\+)?window:\d+(\+globals:[1-9]\d*)?"]
  if not any(re.fullmatch(form, text) for form in known):
    raise BadInput(f"mask {text!r} is not known: give 'all', 'causal', 'window:24' (frames to each side), "
                   "'causal+window:24' or 'window:24+globals:16'.")
  stride = -(-frames // found["globals"]) if "globals" in found else None
  window = min(found["window"], FAR) if "window" in found else None
  return Rule("causal" in found, window, stride)


class Marks(NamedTuple):
  """What tells tokens whom they see: the last dim is of tokens, and what stands before it as one likes.

  segment: tokens see those of an equal one, none if it is negative. frame: of their film; None where the rule asks for
  none. rule: of queries; that of keys is the same.
  """

  segment: Int[Array, "*_ l"]
  frame: Int[Array, "*_ l"] | None = None
  rule: Rule = ALL


def sees(queries: Marks, keys: Marks) -> Bool[Array, "l s"]:
  """Which of the keys [s] each of the queries [l] sees."""
  seen = (queries.segment[:, None] == keys.segment[None]) & (keys.segment >= 0)[None]
  return seen & queries.rule.joins(queries.frame[:, None], keys.frame[None]) if queries.rule else seen


def meet(queries: Marks, keys: Marks) -> Bool[Array, "..."]:
  """Whether any query may see any key, of their last dims; the others broadcast. It may be wrong only in saying so."""
  def span(x, there):
    return jnp.where(there, x, FAR).min(-1), jnp.where(there, x, -FAR).max(-1)

  rule, there, known = queries.rule, queries.segment >= 0, keys.segment >= 0
  (low, high), (first, last) = span(queries.segment, there), span(keys.segment, known)
  some = (low <= last) & (first <= high)
  if not rule:
    return some
  (low, high), (first, last) = span(queries.frame, there), span(keys.frame, known)
  if rule.window is not None:
    near = (low - last <= rule.window) & (first - high <= rule.window)
    if rule.stride is not None:
      near |= (known & (keys.frame % rule.stride == 0)).any(-1)
    some &= near
  return some & (first <= high) if rule.causal else some
