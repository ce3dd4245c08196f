"""A run's folder: one trainer at a time, one config for its whole life.

    config.json   what the run was started with       lock   who trains here now
    base.json     of adapters beside another run: which checkpoint of that
"""

import fcntl
import fnmatch
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from anisora_jax.errors import BadInput

ABSENT = "absent"


@contextmanager
def usable(folder: Path) -> Iterator[None]:
  """Turns a folder that cannot be written (rights, full disk, a file of that name) into BadInput."""
  try:
    yield
  except OSError as error:
    raise BadInput(f"{folder} cannot be a run's folder: {error.strerror}: free it, or take another.") from None


@contextmanager
def lock(folder: str | Path, say: Callable[[str], None] = print) -> Iterator[None]:
  """Holds a run's folder, making it if need be; raises BadInput while another trainer does. The first host does it.

  The kernel's lock ends with the process that holds it, however it dies, so none is ever stale; host and process id
  stand in the file for the message only.
  """
  folder = Path(folder)
  if jax.process_index() != 0:
    yield
    return
  with usable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise BadInput(f"{folder} is in use by {file.read().strip() or 'another trainer'}: wait for it or stop it, or "
                     f"take another folder.") from None
    except OSError as error:
      say(f"{folder} is on a file system without locks ({error.strerror}): see that no other trainer uses it.")
    with usable(folder):
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
      file.flush()
    yield
    file.truncate(0)


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
  """{"train": {"rate": 1}} -> {"train.rate": 1}; lists and empty dicts are values."""
  flat = {}
  for name, value in config.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
  return flat


def differences(old: dict, new: dict) -> dict[str, str]:
  """{"train.rate": "0.0001 -> 0.001"} for every field that is not the same, in the order of their names."""
  # Through JSON, as the old one has been: a tuple and a list are one thing there.
  before, after = (flatten(json.loads(json.dumps(config))) for config in (old, new))
  show = {name: [json.dumps(config[name]) if name in config else ABSENT for config in (before, after)]
          for name in sorted(before | after)}
  return {name: f"{a} -> {b}" for name, (a, b) in show.items() if a != b}


def write_config(path: Path, config: dict) -> None:
  """Writes a JSON file of a run's folder whole or not at all; the first host does it. Raises BadInput."""
  if jax.process_index() == 0:
    # A rename, so that a kill leaves the old file or the new one; of bytes on the disk, so that a power cut does, too.
    partial = path.with_suffix(".partial")
    with usable(path.parent):
      with partial.open("w") as file:
        file.write(json.dumps(config, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
      partial.replace(path)


def read_config(path: Path) -> dict[str, Any]:
  """What such a file holds. Raises BadInput for one that cannot be read."""
  try:
    config = json.loads(path.read_text())
  except ValueError:
    config = None
  if not isinstance(config, dict):
    raise BadInput(f"{path} is not a config that can be read: restore it, or take another folder.")
  return config


def keep_config(folder: str | Path, config: dict, may_change: Iterable[str] = ()) -> dict[str, str]:
  """Writes config.json into a new run's folder, or holds config against the one there. Returns what changed, to say.

  config: JSON. may_change: names of fields, or patterns like "report.*", that a run may resume with otherwise; so may
  fields that were added since, which nobody could choose. The file then takes the new values. Raises BadInput with
  every other difference, as "field: old -> new".
  """
  path, allowed = Path(folder) / "config.json", list(may_change)
  changed: dict[str, str] = {}
  if path.exists():
    old = read_config(path)
    known, changed = flatten(old), differences(old, config)
    refused = [f"{name}: {change}" for name, change in changed.items()
               if name in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)]
    if refused:
      raise BadInput(f"{folder} holds a run of another config ({'; '.join(refused)}): take these back, go on with the "
                     "version that wrote it, or take another folder.")
    changed = {name: change if name in known else f"{change}, for the run is older than this field"
               for name, change in changed.items()}
  if changed or not path.exists():
    write_config(path, config)
  return changed
