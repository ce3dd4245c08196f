"""A config as the settings of the stages: read once, checked, and passed on as frozen dataclasses."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from anisora_jax.errors import BadInput, nearest
from curation import budget, child, clips, cut, describe, film, keep, measure, probe, report, shards


@dataclass(frozen=True)
class Settings:
  """film: of what is done to one film at a time; the rest looks at all of them."""
  film: film.Settings
  keep: keep.Settings
  budget: budget.Settings
  pack: shards.Settings
  report: report.Settings


FILM = {"limits": child.Limits, "probe": probe.Settings, "cut": cut.Settings, "measure": measure.Settings,
        "describe": describe.Settings, "clip": clips.Settings}
ALL = {"keep": keep.Settings, "budget": budget.Settings, "pack": shards.Settings, "report": report.Settings}


def read(config: ConfigDict) -> Settings:
  """Raises BadInput where a part or a field is unknown or missing, or a value is out of range."""
  for name in config:
    if name not in FILM | ALL:
      raise BadInput(f"config.{name} is no stage: {nearest(name, FILM | ALL)}")
  made = {name: _made(kind, name, config) for name, kind in (FILM | ALL).items()}
  made["keep"].check({*made["measure"].names(), "text_area"})  # a rule may allow for text that nobody looks for
  return Settings(film.Settings(**{name: made[name] for name in FILM}), **{name: made[name] for name in ALL})


def _made(kind: type, name: str, config: ConfigDict) -> Any:
  fields = config[name].to_dict() if name in config else {}
  for field in fields:
    if field not in kind.__dataclass_fields__:
      raise BadInput(f"config.{name}.{field} is no setting: {nearest(field, kind.__dataclass_fields__)}")
  return kind(**fields)
