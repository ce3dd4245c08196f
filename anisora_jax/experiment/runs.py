"""A run's folder, as the assembly reads it."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from anisora_jax.errors import BadInput


def saved_config(folder: Path) -> ConfigDict:
  """The config of the run in a folder. Raises BadInput where there is none."""
  path = folder / "config.json"
  if not path.is_file():
    raise BadInput(f"{folder} holds no run, it has no config.json: give the --workdir of a training run.")
  return ConfigDict(json.loads(path.read_text()))
