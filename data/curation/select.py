"""Which of the measured shots become clips: what the rules, the copies and the budget leave."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from curation import budget, duplicates, film, keep
from curation.child import Child
from curation.items import STAGES, Candidate, Film, Rejected, Source
from curation.settings import Settings
from curation.store import Store


@dataclass
class Selection:
  """What was chosen of all films, and what was not.

  films: name -> Film, of all that can be used. measured, chosen: candidates in order of ids. copies: pairs of
  films that are one. ranked: how many clips the budget chose from. choice: what it says; None without a budget.
  """
  films: dict[str, Film] = field(default_factory=dict)
  measured: list[Candidate] = field(default_factory=list)
  chosen: list[Candidate] = field(default_factory=list)
  rejected: list[Rejected] = field(default_factory=list)
  copies: list[tuple[str, str]] = field(default_factory=list)
  ranked: int = 0
  choice: budget.Choice | None = None


def passing(candidates: Sequence[Candidate], rules: Sequence[keep.Rule]) -> tuple[list[Candidate], list[Rejected]]:
  """Those that break no rule, and those that do."""
  kept, rejected = [], []
  for candidate in candidates:
    if broken := keep.judge(candidate.measures, rules):
      rejected.append(Rejected(candidate.shot.id, candidate.shot.film, "keep", *broken))
    else:
      kept.append(candidate)
  return kept, rejected


def bands(child: Child, source: Source, settings: Settings, store: Store) -> Iterator[tuple[int, tuple[str, str]]]:
  """Analyses a film; yields (key, (key of the film, id)) of the clips that break no rule."""
  found = film.guarded(child, source, settings.film, store.folder)
  kept, _ = passing(found.candidates, settings.keep.parsed)
  prints = store.held("prints", source.key) if kept else {}
  for candidate in kept:
    for key in duplicates.bands(prints[candidate.shot.id]):
      yield key, (source.key, candidate.shot.id)


def compare(child: Child, group: tuple, store: Store) -> Iterator[list[str]]:
  """Yields those pairs of ids that are copies. group: ((key of a film, key of another), pairs of ids)."""
  (first, second), pairs = group
  prints, others = store.held("prints", first), store.held("prints", second)
  for a, b in sorted(pairs):
    if duplicates.same(prints[a], others[b]):
      yield [a, b]


def select(sources: Sequence[Source], pairs: Iterable[Sequence[str]], settings: Settings, store: Store) -> Selection:
  """Reads what was found of every film and chooses. pairs: ids that `compare` gave."""
  chosen = Selection()
  kept: list[Candidate] = []
  for source in sources:
    found = film.findings(source, settings.film, store)
    chosen.rejected += found.rejected
    if found.film is not None:
      chosen.films[source.name] = found.film
      chosen.measured += found.candidates
      passed, rejected = passing(found.candidates, settings.keep.parsed)
      kept, chosen.rejected = kept + passed, chosen.rejected + rejected
  there = {candidate.shot.id: candidate.shot.film for candidate in kept}
  pairs = [(a, b) for a, b in pairs if a in there and b in there]
  chosen.copies = duplicates.same_films(pairs, there)
  left, copies = duplicates.keep_best(kept, pairs, chosen.films)
  chosen.ranked = len(left)
  chosen.chosen, beyond, chosen.choice = budget.select(left, settings.budget)
  chosen.rejected += copies + beyond
  return chosen


def drop(selection: Selection, rejected: Sequence[Rejected]) -> None:
  """Takes chosen shots out, and of films all of them, each with its reason."""
  why = {item.what: item for item in rejected}
  reasons = {c.shot.id: why.get(c.shot.id) or why.get(c.shot.film) for c in selection.chosen}
  selection.rejected += [replace(reason, what=shot) for shot, reason in reasons.items() if reason]
  selection.chosen = [c for c in selection.chosen if not reasons[c.shot.id]]


def counts(sources: Sequence[Source], selection: Selection) -> Counter:
  """What happened to every film at the probe and to every shot after it, for `keep.funnel`."""
  tally: Counter = Counter()

  def pass_through(film_: str, stages: Sequence[str], end: Rejected | None = None) -> None:
    for stage in stages:
      tally[keep.entered(stage, film_)] += 1
      if end is not None and end.stage == stage:
        tally[keep.turned_away(end)] += 1
        return
      tally[keep.left(stage, film_)] += 1

  at_probe = {item.film: item for item in selection.rejected if item.stage == "probe"}
  for source in sources:
    pass_through(source.name, ["probe"], at_probe.get(source.name))
  for item in selection.rejected:
    if item.stage != "probe":  # of a whole film, its shots are not known: it counts as one where it ended
      pass_through(item.film, [item.stage] if item.what == item.film else STAGES[1:], item)
  for candidate in selection.chosen:
    pass_through(candidate.shot.film, STAGES[1:])
  return tally
