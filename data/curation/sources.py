"""Which files to look at: a folder of films, or a pattern."""

import fnmatch
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pack

from anisora_jax.errors import BadInput
from curation.items import Source

WORDS, MASKS = (".txt", ".json"), ".masks.npz"  # of the files that may stand beside a film
SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
            ".ogv", ".mxf", ".3gp", ".gif", ".y4m"}


def find(films: str, out: Path) -> list[Source]:
  """All files of a folder with the suffix of a film, or all that a pattern matches, sorted by name.

  films: a folder, a file, or a pattern whose * also crosses folders. What lies in `out`, what is hidden, and folders
  are left out; links to folders are not followed. Raises BadInput where nothing is found.
  """
  root, pattern = _divided(films)
  found: dict[str, Source] = {}
  seen = 0
  for name in _walk(root, out.resolve()):
    seen += 1
    if fnmatch.fnmatchcase(name, pattern) if pattern else Path(name).suffix.lower() in SUFFIXES:
      source = _source(root, name)
      if source.name in found:
        raise BadInput(f"two films are both named {source.name!r} when their names are read as UTF-8: rename one.")
      found[source.name] = source
  if not found:
    raise BadInput(f"no films in {films}: {seen} files are there, none " + (
      "is matched" if pattern else f"ends in {' '.join(sorted(SUFFIXES))}") + "; python data/toons.py draws some.")
  return [found[name] for name in sorted(found)]


def _divided(films: str) -> tuple[Path, str]:
  """(the folder to walk, the pattern of names below it or "" for every film)."""
  path = Path(films)
  if path.is_dir():
    return path, ""
  if path.exists():
    return path.parent, _literal(path.name)
  fixed = []
  for part in path.parts[:-1]:
    if any(letter in part for letter in "*?["):
      break
    fixed.append(part)
  root = Path(*fixed) if fixed else Path()
  if not root.is_dir() or not any(letter in films for letter in "*?["):
    raise BadInput(f"--films {films} is not there: give a folder of films, a film, or a pattern such as 'FILMS/*.mkv'.")
  return root, Path(*path.parts[len(fixed):]).as_posix()


def _literal(name: str) -> str:
  return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _walk(root: Path, out: Path) -> Iterator[str]:
  """Names below `root`, posix, of everything that is no folder and not hidden."""
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() != out]
    for name in names:
      if not name.startswith("."):
        yield (Path(folder) / name).relative_to(root).as_posix()


def _source(root: Path, name: str) -> Source:
  path, raw = root / name, os.fsencode(name)
  try:
    status = path.stat()
    state = (status.st_size, status.st_mtime_ns)
  except OSError:
    state = (-1, -1)  # a link to nothing or to itself: what it is, the probe says
  # A name that is no UTF-8 is written with escapes, since records and reports are UTF-8.
  return Source(hashlib.sha256(raw).hexdigest()[:24], raw.decode("utf-8", "backslashreplace"), str(path), state)


def beside(source: Source) -> dict[str, str]:
  """ "source" and "licence" as NAME.json beside a film says them, those that it says. Raises video.Unreadable."""
  _, known, _ = pack.read_words(Path(source.path))
  return {name: str(known[name]) for name in ("source", "licence") if name in known}


def beside_state(source: Source, suffixes: Sequence[str]) -> list[list[int] | None]:
  """Sizes and times of change of files beside a film, None for those that are not there."""
  files = [Path(source.path).with_suffix(suffix) for suffix in suffixes]
  return [[file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else None for file in files]
