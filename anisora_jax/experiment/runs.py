"""A run's folder, as the assembly reads it."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from anisora_jax.checkpoints import workdir
from anisora_jax.errors import BadInput


class Older(BadInput, AttributeError):
  """A saved config lacks a field that was added since, and here is no config to take it from, as training has."""


class Saved(ConfigDict):
  """The config of a run. Reading a field that it lacks raises Older."""

  def __getattr__(self, name: str) -> Any:
    try:
      return super().__getattr__(name)
    except AttributeError as error:
      raise Older(f"the run's config.json has no field {name!r}, so an older version wrote it: use that, or add "
                  "the field with its value in configs/base.py.") from error


def saved_config(folder: Path) -> ConfigDict:
  """The config of the run in a folder. Raises BadInput where there is none that can be read."""
  path = folder / "config.json"
  if not path.is_file():
    raise BadInput(f"{folder} holds no run, it has no config.json: give the --workdir of a training run.")
  fields = workdir.read_config(path)
  return Saved({name: Saved(value) if isinstance(value, dict) else value for name, value in fields.items()})
