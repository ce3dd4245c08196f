"""Every attention scheme x kernel x mask x split of up to 8 devices x length of a frame is one softmax: `make proof`.

`make test` runs a sample. What is left out is what `attention.check` refuses, and nothing else is.
"""

import math
from itertools import product

import pytest
from card import stand_in
from overtake import overtaking
from schemes import HEADS, SEEN, assert_softmax, case, on

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels, splash
from anisora_jax.models.attention import LOCAL, PATTERNS
from anisora_jax.parallel.sight import PADDED, Rule

MASKS = {  # "nothing" is hidden; all others also hide padding, and all but "padding" other segments
  "nothing": None, "padding": PADDED, "segments": Rule(), "causal": Rule(causal=True), "window": Rule(window=2),
  "window+globals": Rule(window=1, stride=3), "causal+window": Rule(causal=True, window=2),
  "causal+window+globals": Rule(causal=True, window=1, stride=3)}
LENGTHS = (30, 32, 33, 57)  # tokens of a frame, before they are padded
SPLITS = [(clip, seq) for clip, seq in product((1, 2, 4, 8), repeat=2) if clip * seq <= 8]
KERNELS = list(LOCAL)  # Pallas's kernel for TPUs runs interpreted, NVIDIA's call is stood in for
ALL = list(product(PATTERNS, SPLITS, MASKS, KERNELS))  # kernels last, as they share what is true


def all_heads(pattern: str, split: tuple[int, int]) -> tuple[int, ...]:
  """Of 8 devices that share 6 heads two exchange, of those that share 12 four; the others ring."""
  return (6, 12) if pattern == "hybrid" and math.prod(split) == 8 else (HEADS[pattern],)


def lack(pattern: str, split: tuple[int, int], mask: str, kernel: str) -> str:
  """Why a combination is left out, as `attention.check` says it, or nothing."""
  if pattern == "full" and split != (1, 1):
    return "pattern 'full' needs mesh axes clip x seq = 1"
  if pattern == "local_global" and "window" not in mask:
    return "pattern 'local_global' needs a window of frames"
  if kernel == "cudnn" and mask not in ("nothing", "padding"):
    return "kernel 'cudnn' takes no rows that clips share"
  if kernel == "splash" and mask not in ("nothing", "padding", "segments"):
    return "kernel 'splash' hides no frames from each other"
  return ""


def named(part) -> str:
  """A part of a test's name."""
  return "x".join(map(str, part)) if isinstance(part, tuple) else str(part)


@pytest.fixture(autouse=True)
def _as_on_accelerators(monkeypatch):
  """Rings are loops, beside which nothing is sent here. Tiles are small, so that there are many."""
  monkeypatch.setitem(kernels.SIDE, "cpu", 20)
  monkeypatch.setattr(splash, "INTERPRET", True)
  stand_in()
  for name in ("splash", "cudnn"):
    monkeypatch.setitem(LOCAL, name, LOCAL[name]._replace(platform=None, dtypes=("float32",)))
  monkeypatch.setattr(attention, "STRAIGHT", ())


def assert_exact(pattern: str, split: tuple[int, int], mask: str, kernel: str, lengths: tuple[int, ...],
                 heads: int) -> None:
  """Values and gradients, of clips of each length that are padded, and packed of segments.

  Lengths that are padded to the same one are clips of one batch. Where nothing is hidden, what pads is tokens.
  """
  groups = {}
  for length in lengths:
    groups.setdefault(length + -length % split[1], []).append(length)
  cases = [case(heads, split[0], padded, tuple(group), MASKS[mask]) for padded, group in groups.items()]
  assert overtaking(assert_softmax(pattern, on(*split), kernel, cases)) == []


@pytest.mark.product
@pytest.mark.parametrize(("pattern", "split", "mask", "kernel", "heads"), [
  (*run, heads) for run in ALL if not lack(*run) for heads in all_heads(*run[:2])], ids=named)
def test_all_are_one_softmax(pattern, split, mask, kernel, heads):
  assert_exact(pattern, split, mask, kernel, LENGTHS, heads)


@pytest.mark.parametrize(("pattern", "split", "mask", "kernel", "length"), [
  ("full", (1, 1), "nothing", "dense", 33), ("ring", (1, 2), "segments", "splash", 57),
  ("ring", (1, 3), "segments", "dense", 33), ("ring_both", (1, 4), "causal", "blockwise", 30),
  ("ulysses", (2, 1), "causal+window+globals", "dense", 33),
  ("local_global", (2, 2), "window+globals", "blockwise", 30), ("hybrid", (2, 2), "causal+window", "dense", 33),
  ("local_global", (8, 1), "window", "dense", 32), ("ring", (4, 1), "nothing", "cudnn", 33),
  ("ring_both", (2, 4), "padding", "cudnn", 30), ("ulysses", (4, 2), "padding", "cudnn", 33),
  ("hybrid", (2, 4), "causal+window+globals", "blockwise", 57)], ids=named)
def test_some_of_all_are_one_softmax(pattern, split, mask, kernel, length):
  assert_exact(pattern, split, mask, kernel, (length,), all_heads(pattern, split)[-1])


def test_what_is_left_out_is_refused_and_nothing_else():
  assert set(PATTERNS) == set(HEADS) and {rule for rule in MASKS.values() if rule is not None} == set(SEEN)
  for pattern, split, mask, kernel in ALL:
    said = ""
    try:
      attention.check(pattern, kernel, on(*split), HEADS[pattern], "float32", MASKS[mask])
    except BadInput as mistake:
      said = str(mistake)
    expected = lack(pattern, split, mask, kernel)
    assert said.startswith(expected) and bool(said) == bool(expected), (pattern, split, mask, kernel, said)
