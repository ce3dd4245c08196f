"""One film through the stages: what each found is stored, so that nothing is done twice.

`analyse` goes from the file to measured shots, `finish` from chosen shots to captioned clips; both run in a `child`.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anisora_jax.loaders import video
from curation import clips, cut, describe, duplicates, measure, probe, sources
from curation.child import Child, Limits, Lost
from curation.items import Candidate, Film, Rejected, Shot, Source
from curation.store import Store, digest

ANALYSIS = ("probe", "cut", "measure")


@dataclass(frozen=True)
class Settings:
  """What decides what is found and what is cut out of a film: the settings of each stage that reads it."""
  limits: Limits
  probe: probe.Settings
  cut: cut.Settings
  measure: measure.Settings
  describe: describe.Settings
  clip: clips.Settings


def analyse(source: Source, settings: Settings, folder: Path) -> None:
  """Probes, cuts and measures one film. The results are in the store."""
  store, chain = Store(folder), Chain(source, settings)

  def probed() -> dict:
    result = probe.probe(Path(source.path), source.name, settings.probe)
    return {"film" if isinstance(result, Film) else "rejected": asdict(result)}

  found = store.once("probe", source.key, chain.probe(), probed)
  if "rejected" in found:
    return
  film = read_film(found["film"], source)
  found = store.once("cut", source.key, chain.cut(film), lambda: _cut(film, settings))
  film = replace(film, frames=found["frames"])
  shots = [read_shot(shot) for shot in found["shots"]]
  measured = store.once("measure", source.key, chain.measure(film), lambda: _measured(film, shots, settings))
  left = [read_candidate(item) for item in measured["candidates"]]
  store.once("prints", source.key, chain.prints(film), lambda: {
    candidate.shot.id: duplicates.prints(film, candidate.shot) for candidate in left})


@dataclass(frozen=True)
class Chain:
  """What the result of each stage of one film was made from, as hashes: file, settings, and what stands before."""
  source: Source
  settings: Settings

  def probe(self) -> str:
    return digest(self.source.name, self.source.state, self.settings.probe)

  def cut(self, film: Film) -> str:
    # Where a film lies, and how many frames its container claims, decides nothing.
    return digest(replace(film, path="", frames=0), self.settings.cut)

  def measure(self, film: Film) -> str:
    return digest(self.cut(film), self.settings.measure)

  def prints(self, film: Film) -> str:
    return digest(self.measure(film), "prints")

  def describe(self, film: Film) -> str:
    words = sources.beside_state(self.source, sources.WORDS)
    return digest(replace(film, path="", frames=0), self.settings.describe, words)

  def lost(self) -> str:
    return digest(self.probe(), self.settings.limits, self.settings.cut, self.settings.measure)


def _cut(film: Film, settings: Settings) -> dict:
  try:
    shots, rejected, frames = cut.cut(film, settings.cut)
  except video.Unreadable as error:
    shots, rejected, frames = [], [Rejected(film.name, film.name, "cut", "unreadable", str(error))], 0
  return {"shots": [asdict(shot) for shot in shots], "rejected": [asdict(item) for item in rejected], "frames": frames}


def _measured(film: Film, shots: list[Shot], settings: Settings) -> dict:
  candidates, rejected = [], []
  for shot in shots:
    try:
      candidates.append(asdict(Candidate(shot, film.fps, measure.measure(film, shot, settings.measure), ())))
    except video.Unreadable as error:
      rejected.append(asdict(Rejected(shot.id, film.name, "measure", "unreadable", str(error))))
  return {"candidates": candidates, "rejected": rejected}


@dataclass(frozen=True)
class Findings:
  """What is known of one film after `analyse`. film is None where it was turned away whole."""
  film: Film | None
  shots: int
  candidates: list[Candidate]
  rejected: list[Rejected]


def findings(source: Source, settings: Settings, store: Store) -> Findings | str:
  """Reads what `analyse` stored; where it has not finished for these settings, the name of the stage that is due."""
  chain = Chain(source, settings)
  lost = store.get("lost", source.key, chain.lost())
  if lost is not None:
    return Findings(None, 0, [], [Rejected(**lost)])
  if (found := store.get("probe", source.key, chain.probe())) is None:
    return "probe"
  if "rejected" in found:
    return Findings(None, 0, [], [Rejected(**found["rejected"])])
  film = read_film(found["film"], source)
  if (shots := store.get("cut", source.key, chain.cut(film))) is None:
    return "cut"
  if (measured := store.get("measure", source.key, chain.measure(film))) is None:
    return "measure"
  if not store.has("prints", source.key, chain.prints(film)):
    return "deduplicate"
  return Findings(replace(film, frames=shots["frames"]), len(shots["shots"]),
                  [read_candidate(item) for item in measured["candidates"]],
                  [Rejected(**item) for item in shots["rejected"] + measured["rejected"]])


def guarded(child: Child, source: Source, settings: Settings, folder: Path) -> Findings:
  """Runs `analyse` in a child unless its results are there; a film that crashes or hangs is turned away, for good."""
  store = Store(folder)
  found = findings(source, settings, store)
  if isinstance(found, str):
    try:
      child.call(analyse, source, settings, folder)
    except Lost as lost:
      reason, detail = lost.args
      stage = findings(source, settings, store)
      store.put("lost", source.key, Chain(source, settings).lost(),
                asdict(Rejected(source.name, source.name, stage, reason, detail)))
    found = findings(source, settings, store)
  return found


def finish(source: Source, film: Film, candidate: Candidate, settings: Settings, folder: Path) -> str:
  """Captions and encodes a chosen shot, as far as that is not done. The results are in the store.

  Returns why it cannot be read any more, or "".
  """
  store = Store(folder)
  told = captions(source, film, settings, store)
  if _untold(told, candidate):
    caption = describe.describe(film, candidate, settings.describe)
    told[candidate.shot.id] = asdict(caption) | {"of": _seen(candidate)}
    store.put("describe", source.key, Chain(source, settings).describe(film), told)
  try:
    clips.Held(store, source, film, settings.clip).make(candidate)
  except video.Unreadable as error:
    return str(error)
  return ""


def captions(source: Source, film: Film, settings: Settings, store: Store) -> dict[str, dict]:
  """id of a shot -> its caption, of those that were asked for."""
  return store.get("describe", source.key, Chain(source, settings).describe(film)) or {}


def _seen(candidate: Candidate) -> str:
  """What a caption was made from, besides the film."""
  return digest(candidate.shot, candidate.measures)


def _untold(told: dict[str, dict], candidate: Candidate) -> bool:
  """Whether a shot is to be described: in every run also one that a provider had no words for, or none just then."""
  caption = told.get(candidate.shot.id, {})
  return caption.get("of") != _seen(candidate) or not caption["text"] or caption["again"]


def unfinished(source: Source, film: Film, candidate: Candidate, settings: Settings, store: Store) -> bool:
  """Whether `finish` has anything to do."""
  path = clips.Held(store, source, film, settings.clip).path(candidate.shot)
  return not path.is_file() or _untold(captions(source, film, settings, store), candidate)


def read_film(stored: dict, source: Source) -> Film:
  return Film(**{**stored, "path": source.path, "repairs": tuple(stored["repairs"])})


def read_shot(stored: dict) -> Shot:
  return Shot(**{**stored, "box": tuple(stored["box"])})


def read_candidate(stored: dict) -> Candidate:
  return Candidate(**{**stored, "shot": read_shot(stored["shot"]), "prints": tuple(stored["prints"])})
