"""The whole of curation, stage after stage: the assembly of what the other files hold."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records, video
from curation import clips, duplicates, film, keep, pages, pipeline, select, shards, sources
from curation.child import Child, Lost
from curation.items import Candidate, Rejected, Source
from curation.pipeline import Runner, Work
from curation.progress import bar
from curation.select import Selection
from curation.settings import Settings
from curation.store import Store, digest, land

LEFTOVERS = ("lost", "lost_clips")  # verdicts on films that crashed or hung


def curate(films: str, out: Path, settings: Settings, runner: Runner, retry: bool = False) -> None:
  """Curates the films into `out`; says what came of it. retry: those again that crashed or ran out of time."""
  found = sources.find(films, out)
  store = Store(out / "work")
  with _alone(store.folder):
    done = digest(settings, found, [sources.beside_state(source, [*sources.WORDS, sources.MASKS]) for source in found])
    if store.get("done", "all", done) is not None and (out / records.INDEX).is_file() and not retry:
      print(f"{out} is complete already")
      return
    (out / records.INDEX).unlink(missing_ok=True)
    if retry:
      for stage in LEFTOVERS:
        shutil.rmtree(store.folder / stage, ignore_errors=True)
    selection = choose(found, settings, store, runner)
    make(found, selection, settings, store, runner)
    entries = entries_of(found, selection, settings, store)
    funnel = keep.funnel(select.counts(found, selection), sources_of(found, entries, settings))
    if not entries:
      raise BadInput(f"none of the {len(found)} files gave a clip: {why_none(funnel['stages'])}.")
    index = pack(out, entries, selection, settings, store, runner)
    pages.write(out, found, selection, (entries, index, funnel), settings, store, runner)
    land(out / records.INDEX, (json.dumps(index | {"funnel": funnel["stages"]}, indent=1) + "\n").encode())
    if not any("caption_failed" in entry.candidate.facts for entry in entries):
      store.put("done", "all", done, True)
  said(out, index, funnel["stages"])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
  """Keeps a second run out of the same folder; the lock goes with the process, however it ends."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BadInput(f"another run works in {folder.parent}: wait for it, or take another --out.") from error
    yield


def choose(found: Sequence[Source], settings: Settings, store: Store, runner: Runner) -> Selection:
  """Analyses every film, finds copies, and selects."""
  largest_first = sorted(found, key=lambda source: (-source.state[0], source.name))
  bands = Work(select.bands, (settings, store), settings.film.limits)
  compare = Work(select.compare, (store,), settings.film.limits)
  with bar("films analysed", len(found), "film", lambda: store.count("prints")):
    pairs = pipeline.pairs("analyse", largest_first, bands, compare, store.folder, runner)
  return select.select(found, pairs, settings, store)


def finish(child: Child, item: tuple, settings: film.Settings, store: Store) -> Iterator[None]:
  """Beam's wrapper of `film.finish`, a call a clip: one that crashes or hangs costs only itself.

  item: (source, film, chosen candidates).
  """
  source, about, chosen = item
  for candidate in chosen:
    if lost(source, candidate, settings, store) or not film.unfinished(source, about, candidate, settings, store):
      continue
    try:
      damage = child.call(film.finish, source, about, candidate, settings, store.folder)
      why = ("unreadable", damage) if damage else None
    except Lost as failure:
      why = failure.args
    if why:
      store.put("lost_clips", *_lost_at(source, candidate, settings),
                asdict(Rejected(candidate.shot.id, source.name, "pack", *why)))
  yield from ()


def _lost_at(source: Source, candidate: Candidate, settings: film.Settings) -> tuple[str, str]:
  """Where the store keeps the verdict on a clip, and what it was made from."""
  beside = sources.beside_state(source, [*sources.WORDS, sources.MASKS])
  return f"{source.key}-{candidate.shot.start:06}", digest(source.state, beside, candidate.shot, settings)


def lost(source: Source, candidate: Candidate, settings: film.Settings, store: Store) -> Rejected | None:
  """The verdict on a clip that crashed, hung or could not be read."""
  held = store.get("lost_clips", *_lost_at(source, candidate, settings))
  return Rejected(**held) if held else None


def make(found: Sequence[Source], selection: Selection, settings: Settings, store: Store, runner: Runner) -> None:
  """Captions and encodes what was chosen; drops clips on which that fails."""
  by_film = {name: list(group) for name, group in groupby(selection.chosen, lambda candidate: candidate.shot.film)}
  items = [(source, selection.films[source.name], by_film[source.name]) for source in found if source.name in by_film]
  work = Work(finish, (settings.film, store), settings.film.limits)
  with bar("clips made", len(items), "film", lambda: store.count("describe")):
    pipeline.each("make", sorted(items, key=lambda item: -len(item[2])), work, store.folder, runner)
  verdicts = (lost(source, candidate, settings.film, store) for source, _, chosen in items for candidate in chosen)
  select.drop(selection, [verdict for verdict in verdicts if verdict])


def entries_of(found: Sequence[Source], selection: Selection, settings: Settings, store: Store) -> list[shards.Entry]:
  """The chosen clips with captions, provenance and the files that hold them, in order of films and frames."""
  by_name = {source.name: source for source in found}
  entries = []
  for name, group in groupby(list(selection.chosen), lambda candidate: candidate.shot.film):
    source, about = by_name[name], selection.films[name]
    held = clips.Held(store, source, about, settings.film.clip)
    captions = film.captions(source, about, settings.film, store)
    try:
      beside = sources.beside(source)
    except video.Unreadable as error:
      select.drop(selection, [Rejected(name, name, "pack", "damaged_words", str(error))])
      continue
    for candidate in group:
      told = captions[candidate.shot.id]
      facts = {"caption_by": told["by"]} if told["text"] else {"no_caption": told["reason"]}
      if told["again"]:
        facts["caption_failed"] = told["detail"]
      entries.append(shards.Entry(
        about, replace(candidate, facts=facts),
        clips.size_of(candidate.shot, settings.film.clip), held.path(candidate.shot),
        beside.get("source", settings.pack.source), beside.get("licence", settings.pack.licence), told["text"]))
  return entries


def sources_of(found: Sequence[Source], entries: Sequence[shards.Entry], settings: Settings) -> dict[str, str]:
  """film -> where it comes from, for the funnel; what no file beside it and no setting says is its folder."""
  told = {entry.film.name: entry.source for entry in entries if entry.source}
  return {source.name: told.get(source.name) or settings.pack.source or source.name.rpartition("/")[0] or "."
          for source in found}


def pack(out: Path, entries: Sequence[shards.Entry], selection: Selection, settings: Settings, store: Store,
         runner: Runner) -> dict:
  """Writes shards and tables; returns the index."""
  films = {name: list(group) for name, group in groupby(entries, lambda entry: entry.film.name)}
  placed = duplicates.split({name: len(group) for name, group in films.items()}, selection.copies,
                            settings.pack.held_out)
  splits = {split: [films[name][k] for name, numbers in placed[split] for k in numbers] for split in records.SPLITS}
  planned = {split: shards.plan(out, split, chosen, settings.pack) for split, chosen in splits.items()}
  shards.sweep(out, [shard for plan in planned.values() for shard in plan])
  plans = [shard for plan in planned.values() for shard in plan]
  with bar("shards written", len(plans), "shard", lambda: store.count("shards")):
    pipeline.each("pack", plans, Work(shards.written, (store,), settings.film.limits), store.folder, runner)
  rows = {split: {form: [shards.write(shard, store) for shard in plan if shard.tfds == form] for form in (False, True)}
          for split, plan in planned.items()}
  if not settings.pack.tfds:
    shutil.rmtree(out / "tfds", ignore_errors=True)
  else:
    shards.write_tfds(out, {split: forms[True] for split, forms in rows.items()})
  shards.write_table(out / shards.TABLE, (
    {**entry.row(), "split": split, "shard": shard.path.name, "number": number} for split, plan in planned.items()
    for shard in plan if not shard.tfds for number, entry in enumerate(shard.entries)))
  rejected = sorted(selection.rejected, key=lambda item: (item.what, item.stage))
  shards.write_table(out / shards.REJECTED, map(asdict, rejected))
  return {
    "clip_seconds": None, "settings": asdict(settings),
    "splits": {split: {"records": sum(row["records"] for row in forms[False]), "films": len(placed[split]),
                       "shards": forms[False]} for split, forms in rows.items()},
    "tfds": {"folder": shards.tfds_folder(out).relative_to(out).as_posix(),
             "shards": {split: forms[True] for split, forms in rows.items()}} if settings.pack.tfds else None,
    "statistics": shards.statistics(entries)}


def why_none(stages: dict[str, dict]) -> str:
  """The commonest reasons of all stages, for a line of print."""
  reasons = sorted(((count, stage, why) for stage, row in stages.items() for why, count in row["why"].items()),
                   reverse=True)
  return "; ".join(f"{stage}: {why} {count}" for count, stage, why in reasons[:4]) or "no shot was found in them"


def said(out: Path, index: dict, stages: dict[str, dict]) -> None:
  """Prints the funnel and where everything is."""
  for stage, row in stages.items():
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(row["why"].items(), key=lambda item: -item[1]))
    print(f"{stage:12} {row['in']:8} in {row['out']:8} out" + (f"   {why}" if why else ""))
  captions = index["statistics"]["captions"]
  print("captions by " + ", ".join(f"{by} {count}" for by, count in captions["by"].items()))
  if captions["again"]:
    print(f"{captions['again']} of them because a provider failed (caption_failed in {out / shards.TABLE}); the same "
          "command asks it again")
  train, held_out = (index["splits"][split]["records"] for split in records.SPLITS)
  print(f"{out}: {train} train and {held_out} held-out clips, {index['statistics']['hours']:.3g} hours; see "
        f"{out / 'report.html'}")
