"""The weights that a run or a film starts from: found, read onto the mesh, adapters of others folded in."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from anisora_jax.adapters import lora
from anisora_jax.checkpoints import manifest, workdir
from anisora_jax.errors import BadInput
from anisora_jax.experiment import adapters as published
from anisora_jax.experiment import weights
from anisora_jax.experiment.parts import Parts, abstract_params
from anisora_jax.models.wan.sizes import Size

BASE = "base.json"


@dataclass(frozen=True)
class Adapter:
  """A file of adapters, and how much it counts."""

  path: Path
  scale: float

  def read(self, size: Size) -> PyTree:
    """The adapters as ours, float32, on the host. Raises BadInput."""
    return unflatten_dict(published.of_file(self.path, size)[1], sep="/")


def adapters_of(words: str, expert: str) -> list[Adapter]:
  """Reads "A", "A=0.8,B" or "low_noise:A=0.8", as model.adapters has it; those for another expert are passed over.

  expert: whose adapters are wanted, "" where there is one network. Raises BadInput.
  """
  found = []
  for word in filter(None, (word.strip() for word in words.split(","))):
    of, colon, rest = word.partition(":")
    of, rest = (of, rest) if colon and of in weights.EXPERTS else ("", word)
    if of and not expert:
      raise BadInput(f"adapters {word!r} are for one of two experts and there is one network: leave out {of}:.")
    path, equals, scale = rest.rpartition("=")
    try:
      made = Adapter(Path(path or scale), float(scale) if equals else 1.0)
    except ValueError:
      raise BadInput(f"adapters {word!r} count {scale!r} times, which is no number: write FILE=0.8.") from None
    if not made.path.exists():
      raise BadInput(f"adapters {made.path} do not exist: give a file of adapters.")
    found += [made] if of in ("", expert) else []
  return found


def base_of(folder: Path, config: ConfigDict) -> str:
  """The weights beside which the adapters of the run in `folder` are trained: of another run the checkpoint that was
  its newest at their first step. Raises BadInput where that is gone or another."""
  named, path = config.model.weights or config.pretrained, folder / BASE
  if not path.is_file():
    return named
  said = workdir.read_config(path)
  checkpoint = Path(named) / "checkpoints" / str(said["step"])
  if (checkpoint / manifest.NAME).is_file() and manifest.sha256(checkpoint / manifest.NAME) == said["manifest"]:
    return str(checkpoint)
  if named != said["weights"]:  # others are wanted, as is said when the run goes on
    return named
  raise BadInput(f"{folder} holds adapters that were trained beside step {said['step']} of {named}, which is gone or "
                 f"another by now: restore {checkpoint} from a copy, or train on beside other --config.model.weights.")


def remember(folder: Path, config: ConfigDict, source: weights.Source | None) -> None:
  """Writes down, for `base_of`, beside which checkpoint of another run the adapters of the one in `folder` begin."""
  checkpoint = source and source.checkpoint and source.checkpoint[0]
  if config.lora.rank and checkpoint and (checkpoint / manifest.NAME).is_file():
    workdir.write_config(folder / BASE, {
      "weights": config.model.weights or config.pretrained, "step": int(checkpoint.name),
      "manifest": manifest.sha256(checkpoint / manifest.NAME)})


def source_of(parts: Parts, config: ConfigDict, expert: str = "", run: Path | None = None) -> weights.Source | None:
  """The weights that the config names, checked and not yet read; None where it names none. Raises BadInput, also where
  adapters that it would fold into them are not there.

  run: the folder of one whose adapters are beside them.
  """
  path = base_of(run, config) if run else config.model.weights or config.pretrained
  if adapters_of(config.model.adapters, expert) and not path:
    raise BadInput(f"model.adapters is {config.model.adapters!r} and there are no weights to fold them into: give "
                   "--config.model.weights=PATH or --config.pretrained=FOLDER, or leave them out.")
  return weights.source(Path(path), parts.size, expert) if path else None


def read(parts: Parts, config: ConfigDict, source: weights.Source, kept: bool, expert: str = "") -> PyTree:
  """Puts a source's weights onto the mesh and folds model.adapters into them. kept: as of `abstract_params`."""
  return with_adapters(weights.read(source, abstract_params(parts, kept)), parts, config.model.adapters, expert)


def with_adapters(params: PyTree, parts: Parts, words: str, expert: str) -> PyTree:
  """Parameters into which files of adapters are folded. words, expert: as of `adapters_of`."""
  for adapter in adapters_of(words, expert):
    found = flatten_dict(adapter.read(parts.size), sep="/")
    # As convert merges them, and as ComfyUI's strength: what is no product counts as often.
    found = {path: adapter.scale * x if path.endswith(lora.DIFF) else x for path, x in found.items()}
    params = folded(params, unflatten_dict(found, sep="/"), adapter.scale)
  return params


def folded(params: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """Parameters with adapters added, each where it was and of its dtype, one kernel after another to spare memory."""
  flat, more = (flatten_dict(tree, sep="/") for tree in (params, adapters))
  layers: dict[str, dict] = {}
  for path, array in more.items():
    layer, _, name = path.rpartition("/")
    layers.setdefault(layer, {})[name] = array
  for layer, found in layers.items():
    start = f"{layer}/" if layer else ""
    beside = {path.removeprefix(start): array for path, array in flat.items() if path.rpartition("/")[0] == layer}
    placed = {name: array.sharding for name, array in beside.items()}
    made = jax.jit(partial(_fold, scale, layer.startswith("blocks/")), out_shardings=placed)(beside, found)
    flat |= {start + name: array for name, array in made.items()}
  return unflatten_dict(flat, sep="/")


def _fold(scale: float, stacked: bool, arrays: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array]) -> dict:
  fold = partial(lora.fold, scale=scale)
  return jax.lax.map(fold, {**arrays, **adapters}) if stacked else fold({**arrays, **adapters})
