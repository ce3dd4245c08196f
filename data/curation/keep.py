"""Which shots are good enough: rules on what was measured, each with a reason, and the counts of what they turn away.

A rule is one line:

  motion >= 0.002                      a number from 0.002 up; also <=, > and <
  0.002 <= motion <= 0.2               a number within a range
  camera in static, pan left           one of these words; every one of them, where a measure is a list of words
  tags not in logo, credits            none of these words
  aesthetic >= 5.5 or absent           a shot on which nobody gave that score passes; without these words it is rejected
  too still: motion >= 0.002           with a name of its own for the reason

Lines are parsed, never evaluated. The first rule that a shot breaks is its reason.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anisora_jax.errors import BadInput, nearest
from curation.items import STAGES, Rejected

FORMS = "'motion >= 0.002', '0.002 <= motion <= 0.2', 'camera in static, pan left' or 'tags not in logo', " \
        "each with 'or absent' or not"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NAME = r"[a-z][a-z0-9_]*"
_HEAD = re.compile(r"(?:(?P<reason>[^:]*):)?(?P<rule>.*?)(?P<absent>\s+or\s+absent)?\s*")
_ONE = re.compile(rf"(?P<name>{_NAME})\s*(?P<sign>[<>]=?)\s*(?P<value>{_NUMBER})")
_TWO = re.compile(rf"(?P<low>{_NUMBER})\s*(?P<under><=?)\s*(?P<name>{_NAME})\s*(?P<sign><=?)\s*(?P<value>{_NUMBER})")
_WORDS = re.compile(rf"(?P<name>{_NAME})\s+(?P<none>not\s+)?in\s+(?P<words>.+)")
_REASON = re.compile(r"[a-z][a-z0-9_ ]{0,39}")


@dataclass(frozen=True)
class Rule:
  """What one measure must be.

  low, high: bounds of a number, which itself passes unless it stands in `open_` ("low", "high"). words: allowed ones,
  or with `none` those that must not occur. absent: whether a shot without the measure passes. reason: for the funnel,
  made from the measure's name where it is empty.
  """
  measure: str
  low: float = -math.inf
  high: float = math.inf
  open_: tuple[str, ...] = ()
  words: tuple[str, ...] = ()
  none: bool = False
  absent: bool = False
  reason: str = ""

  def __post_init__(self):
    if not self.low <= self.high or (self.low == self.high and self.open_):
      raise BadInput(f"no {self.measure} is between {self.low:g} and {self.high:g}: write the lower bound first.")

  def broken(self, measures: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, detail) where the measures break the rule, else None."""
    value = measures.get(self.measure)
    if value is None:
      return None if self.absent else (f"{self.reason or self.measure}_absent", "nobody measured it")
    word, detail = self._words_broken(value) if self.words else self._bounds_broken(value)
    return word and (self.reason or f"{self.measure}_{word}", detail)

  def _bounds_broken(self, value: Any) -> tuple[str, str] | tuple[None, str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      return "no_number", f"{self.measure} is {value!r}"[:80]
    if value < self.low or (value == self.low and "low" in self.open_):
      return "low", f"{value:.4g}, wanted {'above' if 'low' in self.open_ else 'from'} {self.low:g}"
    if value > self.high or (value == self.high and "high" in self.open_):
      return "high", f"{value:.4g}, wanted {'below' if 'high' in self.open_ else 'up to'} {self.high:g}"
    return None, ""

  def _words_broken(self, value: Any) -> tuple[str, str] | tuple[None, str]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(word, str) for word in given):
      return "no_word", f"{self.measure} is {value!r}"[:80]
    wrong = [word for word in given if (word in self.words) == self.none]
    return ("word", ", ".join(wrong)[:80]) if wrong else (None, "")


def parse(line: str) -> Rule:
  """One line as a rule. Raises BadInput."""
  head = _HEAD.fullmatch(line)
  if head is None:
    raise BadInput(f"rule {line!r} is not one line: write {FORMS}.")
  reason, text, shared = head["reason"], head["rule"].strip(), {"absent": head["absent"] is not None}
  if reason is not None:
    if not _REASON.fullmatch(reason.strip()):
      raise BadInput(f"rule {line!r}: {reason.strip()!r} is no name of a reason: take up to 40 small letters, digits, "
                     "spaces and _, letters first.")
    shared["reason"] = reason.strip().replace(" ", "_")
  try:
    if one := _ONE.fullmatch(text):
      bound = "low" if one["sign"][0] == ">" else "high"
      open_ = () if "=" in one["sign"] else (bound,)
      return Rule(one["name"], **{bound: float(one["value"])}, open_=open_, **shared)
    if two := _TWO.fullmatch(text):
      open_ = tuple(bound for bound, sign in (("low", two["under"]), ("high", two["sign"])) if "=" not in sign)
      return Rule(two["name"], float(two["low"]), float(two["value"]), open_, **shared)
  except BadInput as mistake:
    raise BadInput(f"rule {line!r}: {mistake}") from None
  if some := _WORDS.fullmatch(text):
    words = tuple(word.strip() for word in some["words"].split(","))
    if all(words):
      return Rule(some["name"], words=words, none=some["none"] is not None, **shared)
  raise BadInput(f"rule {line!r} cannot be read: write {FORMS}.")


def judge(measures: Mapping[str, Any], rules: Iterable[Rule]) -> tuple[str, str] | None:
  """(reason, detail) of the first rule that is broken, or None."""
  return next((broken for rule in rules if (broken := rule.broken(measures))), None)


@dataclass(frozen=True)
class Settings:
  """rules: lines as in this file's head, tried in order."""
  rules: tuple[str, ...] = ()

  def __post_init__(self):
    if isinstance(self.rules, str):
      raise BadInput(f"keep.rules is one text, {self.rules!r}: give a tuple of lines.")
    object.__setattr__(self, "rules", tuple(self.rules))
    self.parsed  # noqa: B018  a rule that cannot be read is refused before films are

  @cached_property
  def parsed(self) -> tuple[Rule, ...]:
    return tuple(parse(line) for line in self.rules)

  def check(self, measures: Iterable[str]) -> None:
    """Raises BadInput where a rule names something that no stage measures. measures: all names there are."""
    known = set(measures)
    for line, rule in zip(self.rules, self.parsed, strict=True):
      if rule.measure not in known:
        raise BadInput(f"rule {line!r}: nothing measures {rule.measure!r}: {nearest(rule.measure, known)}")


@dataclass(frozen=True)
class Count:
  """What happened to one thing at one stage, for counting. what: "in", "out" or the reason why not.

  kind: "in", "out" or "why", so that no reason can pass for a count.
  """
  stage: str
  film: str
  kind: str
  why: str = ""


def entered(stage: str, film: str) -> Count:
  return Count(stage, film, "in")


def left(stage: str, film: str) -> Count:
  return Count(stage, film, "out")


def turned_away(rejected: Rejected) -> Count:
  return Count(rejected.stage, rejected.film, "why", rejected.reason)


def funnel(counts: Mapping[Count, int], sources: Mapping[str, str]) -> dict[str, dict]:
  """The funnel as plain maps: {"stages": {stage: row}, "films": {film: {stage: row}}, "sources": ...}.

  row: {"in": n, "out": n, "why": {reason: n}}, in = out + all of why. counts: how often each happened, in any order.
  sources: film -> where it comes from. Stages are in their order, everything else in order of names. Raises ValueError
  where something was lost on the way, which is a defect.
  """
  tables: dict[str, dict[str, Counter]] = {"stages": {}, "films": {}, "sources": {}}
  for count, number in counts.items():
    for table, key in (("stages", ""), ("films", count.film), ("sources", sources.get(count.film, "unknown"))):
      tables[table].setdefault(key, Counter())[count.stage, count.kind, count.why] += number
  made = {table: {key: _rows(parts[key], f"{table} {key}") for key in sorted(parts)} for table, parts in tables.items()}
  return made | {"stages": made["stages"].get("", {})}


def _rows(counts: Counter, where: str) -> dict[str, dict]:
  rows = {}
  for stage in STAGES:
    if any(key[0] == stage for key in counts):
      why = {why: number for (at, kind, why), number in sorted(counts.items()) if at == stage and kind == "why"}
      rows[stage] = row = {"in": counts[stage, "in", ""], "out": counts[stage, "out", ""], "why": why}
      if row["in"] != row["out"] + sum(why.values()):
        raise ValueError(f"{where.strip()}: of {row['in']} at {stage}, {row['out']} went on and {sum(why.values())} "
                         "were turned away")
  return rows
