"""Rules of who sees whom: as configs write them, and what may be skipped because nobody sees it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax.errors import BadInput
from anisora_jax.parallel.sight import ALL, Marks, Rule, meet, parse, sees


@pytest.mark.parametrize(("text", "rule"), [
  ("all", ALL), ("causal", Rule(causal=True)), ("window:24", Rule(window=24)), ("window:0", Rule(window=0)),
  ("causal+window:3", Rule(causal=True, window=3)), ("window:5+globals:4", Rule(window=5, stride=6)),
  ("window:5+globals:21", Rule(window=5, stride=1)), ("causal+window:2+globals:1", Rule(True, 2, 21))])
def test_rules_are_read(text, rule):
  """Of a film of 21 frames. Globals are as many as are asked for, or the next fewer that are evenly spread."""
  assert parse(text, 21) == rule
  if rule.stride:
    assert len(range(0, 21, rule.stride)) <= int(text.split(":")[-1])


def test_a_window_beyond_every_film_shows_all_of_it():
  """Also one that is no int32."""
  frames = jnp.arange(4)
  marks = Marks(jnp.zeros_like(frames), frames, parse("window:9999999999", 4))
  assert jax.jit(sees)(marks, marks).all() and jax.jit(meet)(marks, marks)


@pytest.mark.parametrize("text", ["", "none", "casual", "window", "window:-1", "window:2+", "globals:3",
                                  "window:2+causal", "window:2+globals:0", "all+causal", "window:1.5"])
def test_what_is_no_rule_is_refused_in_one_line(text):
  words = f"mask {text!r} is not known: give 'all', 'causal', 'window:24' (frames to each side), 'causal+window:24' or"
  with pytest.raises(BadInput, match=re.escape(words)) as mistake:
    parse(text, 21)
  assert "\n" not in str(mistake.value)


def test_the_share_that_is_seen_is_counted():
  assert ALL.share(7) == 1 and Rule(causal=True).share(4) == 10 / 16 and Rule(window=1).share(4) == 10 / 16
  assert Rule(window=0, stride=3).share(4) == 10 / 16


numbers = st.lists(st.integers(-1, 2), min_size=11, max_size=11)
rules = st.builds(Rule, st.booleans(), st.none() | st.integers(0, 3), st.none()) | st.builds(
  Rule, st.booleans(), st.integers(0, 3), st.integers(1, 4))


@settings(max_examples=200, deadline=None)
@given(numbers, st.lists(st.integers(0, 9), min_size=11, max_size=11), rules)
def test_nothing_that_is_seen_is_skipped(segments, frames, rule):
  whole = Marks(jnp.array(segments), jnp.array(frames), rule)
  queries, keys = jax.tree.map(lambda x: x[:6], whole), jax.tree.map(lambda x: x[6:], whole)
  assert meet(queries, keys) or not sees(queries, keys).any()


@pytest.mark.parametrize(("rule", "met"), [  # tiles of one frame each
  (ALL, "1111 1111 1111 1111"), (Rule(causal=True), "1000 1100 1110 1111"), (Rule(window=1), "1100 1110 0111 0011"),
  (Rule(window=0, stride=3), "1001 1101 1011 1001"), (Rule(True, 0, 2), "1000 1100 1010 1011")], ids=str)
def test_what_no_token_sees_is_skipped(rule, met):
  frames = jnp.arange(4)[:, None].repeat(5, 1)
  marks = Marks(jnp.zeros_like(frames).at[:, 3:].set(-1), frames, rule)
  found = meet(jax.tree.map(lambda x: x[:, None], marks), marks)
  assert (np.asarray(found) == (np.array([list(row) for row in met.split()]) == "1")).all()
  hidden = marks._replace(segment=jnp.full_like(frames, -1))
  other = marks._replace(segment=jnp.where(marks.segment < 0, -1, 5))
  assert not any(meet(*pair).any() for pair in ((hidden, marks), (marks, hidden), (marks, other), (other, marks)))
