"""What is known of each film so far, on disk: STAGE/KEY.json in the folder "work" of OUT, a file a film and stage.

Each file names what it was made from, by a hash of the settings and results before it, so that a run goes on where
another stopped, and another setting redoes what depends on it and nothing else. Files are moved into place whole: a
kill at any moment leaves the old state or the new one. Names of films never become names of files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

FORMAT = 1  # counts up when a stage gives other results for the same settings, so that old results are not taken


def digest(*things: Any) -> str:
  """A hash of plain values and dataclasses."""
  def plain(value):
    if is_dataclass(value):
      return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in a hash")
  return hashlib.sha256(json.dumps([FORMAT, *things], sort_keys=True, default=plain).encode()).hexdigest()


def land(path: Path, content: bytes) -> None:
  """Writes a file whole or not at all; makes its folder."""
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished.write_bytes(content)
  unfinished.replace(path)


@dataclass(frozen=True)
class Store:
  """The folder of results."""
  folder: Path

  def path(self, stage: str, key: str) -> Path:
    return self.folder / stage / f"{key}.json"

  def get(self, stage: str, key: str, needs: str) -> Any | None:
    """The result of a stage, or None where it is not there or was made from something else."""
    path = self.path(stage, key)
    if not path.is_file():
      return None
    held = json.loads(path.read_text())
    return held["result"] if held["needs"] == needs else None

  def held(self, stage: str, key: str) -> Any:
    """The result of a stage that is known to be there, whatever it was made from."""
    return json.loads(self.path(stage, key).read_text())["result"]

  def has(self, stage: str, key: str, needs: str) -> bool:
    """Whether `get` would find a result; reads only the head of the file."""
    path, head = self.path(stage, key), json.dumps({"needs": needs}).encode()[:-1]
    if not path.is_file():
      return False
    with open(path, "rb") as file:
      return file.read(len(head)) == head

  def put(self, stage: str, key: str, needs: str, result: Any) -> None:
    land(self.path(stage, key), json.dumps({"needs": needs, "result": result}).encode())

  def once(self, stage: str, key: str, needs: str, work: Callable[[], Any]) -> Any:
    """The result of a stage, worked out unless it is there. It is what JSON gives back, now as later."""
    if (held := self.get(stage, key, needs)) is None:
      self.put(stage, key, needs, work())
      held = self.get(stage, key, needs)
    return held

  def count(self, stage: str) -> int:
    """How many films have a file of a stage, whatever it was made from."""
    folder = self.folder / stage
    return sum(entry.name.endswith(".json") for entry in os.scandir(folder)) if folder.is_dir() else 0
