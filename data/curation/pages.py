"""What the report shows: samples drawn from what was kept and what was not, their previews, and the numbers."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from anisora_jax.loaders import records
from curation import budget, keep, pipeline, previews, report
from curation.child import Child, Lost
from curation.items import Candidate, Film, Rejected, Source
from curation.pipeline import Runner, Work
from curation.previews import Preview
from curation.select import Selection
from curation.settings import Settings
from curation.store import Store, digest, land

FOLDER = "report"
ROWS = 40           # of a table at most
FIRST = ("motion_per_second", "camera", "sharpness", "aesthetic", "tags")  # measures that are shown at once


def rendered(child: Child, preview: Preview, folder: Path) -> Iterator[None]:
  """Beam's wrapper of `previews.render`; a preview that cannot be made is left out."""
  if not (folder / f"{preview.name}.mp4").is_file():
    try:
      child.call(previews.render, preview, folder)
    except Lost:
      return
  yield from ()


def write(out: Path, found: Sequence[Source], selection: Selection, made: tuple, settings: Settings, store: Store,
          runner: Runner) -> None:
  """Writes OUT/report.html and OUT/report. made: (entries, index, funnel)."""
  entries, index, funnel = made
  kept = sorted(entries, key=lambda entry: digest(entry.candidate.shot.id))[:settings.report.kept]
  measured = {candidate.shot.id: candidate for candidate in selection.measured}
  lost = _lots([item for item in selection.rejected if item.what != item.film], settings.report.rejected)
  shown = {entry.candidate.shot.id: _preview(entry.film, entry.candidate, settings) for entry in kept}
  for item in lost:
    shown[item.what] = _preview(selection.films[item.film], measured.get(item.what) or item, settings)
  work = Work(rendered, (out / FOLDER,), settings.film.limits)
  pipeline.each("previews", list(shown.values()), work, store.folder, runner)
  names = {preview.name for preview in shown.values()}
  for path in (out / FOLDER).glob("*"):
    if path.stem not in names:
      path.unlink()

  def sample(name: str, caption: str = "", licence: str = "", why: Rejected | None = None) -> report.Sample:
    file = f"{FOLDER}/{shown[name].name}"
    there = (out / f"{file}.mp4").is_file()
    tags, more = _tags(measured[name], licence) if name in measured else ([], [])
    return report.Sample(name, caption, f"{file}.mp4" if there else "", f"{file}.jpg" if there else "", tags, more,
                         f"{why.stage}: {why.reason}" if why else "", why.detail if why else "")

  page = report.Report(
    "Curated clips", _facts(found, selection, index), _steps(funnel["stages"]), _histograms(selection, settings.keep),
    [sample(entry.candidate.shot.id, entry.caption, entry.licence) for entry in kept],
    [sample(item.what, why=item) for item in lost],
    _tables(selection, funnel), _charts(selection, settings.budget))
  land(out / "report.html", report.render(page).encode())


def _lots(items: Sequence[Rejected], most: int) -> list[Rejected]:
  """Some of the rejected shots, from every reason in turn, drawn by a hash of their names."""
  groups: dict[str, list[Rejected]] = {}
  for item in sorted(items, key=lambda item: digest(item.what)):
    groups.setdefault(f"{item.stage} {item.reason}", []).append(item)
  return report.spread(groups, most)


def _preview(film: Film, of: Candidate | Rejected, settings: Settings) -> Preview:
  """Of a shot; of one that ended at the cut only its first frame is known."""
  if isinstance(of, Candidate):
    return Preview(film, of.shot.start, of.shot.stop, of.shot.box, settings.report)
  start = int(of.what.rpartition("/")[2])
  return Preview(film, start, min(film.frames, start + round(2 * film.fps) + 1), (0, 0, film.height, film.width),
                 settings.report)


def _tags(candidate: Candidate, licence: str = "") -> tuple[list[str], list[str]]:
  """A clip's facts in a few words: those for everyone, and those for who asks."""
  first = [f"{(candidate.shot.stop - candidate.shot.start) / candidate.fps:.1f} s"] + [licence] * bool(licence)
  more = []
  for name, value in candidate.measures.items():
    if isinstance(value, int | float) and not isinstance(value, bool):
      words = f"{name.replace('_', ' ')} {value:.3g}"
    else:
      words = f"{name.replace('_', ' ')}: {value if isinstance(value, str) else ', '.join(map(str, value))}"[:80]
    (first if name in FIRST else more).append(words)
  return first, more


def _facts(found: Sequence[Source], selection: Selection, index: dict) -> dict[str, str]:
  about = index["statistics"]
  facts = {"files": f"{len(found):,}", "films that can be used": f"{len(selection.films):,}",
           "shots measured": f"{len(selection.measured):,}", "clips": f"{about['clips']:,}",
           "hours of clips": f"{about['hours']:.3g}"}
  facts |= {f"clips to {split.replace('_', ' ')}": f"{index['splits'][split]['records']:,}" for split in records.SPLITS}
  facts |= {"licences": ", ".join(f"{name} {count:,}" for name, count in about["licences"].items()),
            "captions by": ", ".join(f"{name} {count:,}" for name, count in about["captions"]["by"].items()),
            "sizes": ", ".join(f"{name} ({count:,})" for name, count in list(about["sizes"].items())[:6])}
  if selection.choice:
    facts["passes over each clip"] = f"{selection.choice.repeats:.2f}"
  return facts


def _steps(stages: dict[str, dict]) -> list[report.Step]:
  return [report.Step(stage, "films" if stage == "probe" else "clips" if stage == "pack" else "shots", row["in"],
                      row["out"], row["why"]) for stage, row in stages.items()]


def _histograms(selection: Selection, rules: keep.Settings) -> list[report.Histogram]:
  """One of every measure that is a number."""
  chosen = {candidate.shot.id for candidate in selection.chosen}
  values: dict[str, tuple[list, list]] = {}
  for candidate in selection.measured:
    for name, value in candidate.measures.items():
      if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        values.setdefault(name, ([], []))[candidate.shot.id not in chosen].append(float(value))
  return [report.Histogram(name, kept, lost, [
    limit for rule in rules.parsed if rule.measure == name for limit in (rule.low, rule.high) if math.isfinite(limit)])
    for name, (kept, lost) in sorted(values.items())]


def _tables(selection: Selection, funnel: dict) -> dict[str, list[list[str]]]:
  whole = [item for item in selection.rejected if item.what == item.film]
  tables = {"By source": [["source", "files", "films", "shots", "clips", "why not"]] + [
    [source, *(f"{rows.get(stage, {}).get(way, 0):,}" for stage, way in (
      ("probe", "in"), ("probe", "out"), ("cut", "in"), ("pack", "out"))), _reasons(rows)]
    for source, rows in list(funnel["sources"].items())[:ROWS]]}
  if whole:
    tables["Films turned away"] = [["film", "stage", "reason", "detail"]] + [
      [item.film, item.stage, item.reason.replace("_", " "), item.detail]
      for item in sorted(whole, key=lambda item: item.film)[:ROWS]]
  mended = Counter(repair for film in selection.films.values() for repair in film.repairs)
  if mended:
    tables["Mended while reading"] = [["what", "films"]] + [
      [repair.replace("_", " "), f"{count:,}"] for repair, count in sorted(mended.items())]
  return tables


def _reasons(rows: dict[str, dict]) -> str:
  reasons = Counter({f"{stage} {why}".replace("_", " "): count for stage, row in rows.items()
                     for why, count in row["why"].items()})
  commonest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:4]
  return ", ".join(f"{why} {count:,}" for why, count in commonest)


def _charts(selection: Selection, settings: budget.Settings) -> dict:
  if not selection.choice:
    return {}
  note = (f"Expected loss against how many of the {selection.ranked:,} ranked clips are trained on. Chosen: "
          f"{selection.choice.keep:,} clips, {selection.choice.repeats:.2f} passes over each.")
  return {"Budget": (budget.lines(selection.ranked, settings.passes, settings.law()), note)}
