"""Where the weights of a transformer, or of its two experts, lie: files, published folders, runs, converted folders."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree
from tqdm.auto import tqdm

from anisora_jax.checkpoints import leaves, weights
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.checkpoints.tensor_file import Made, Tensor
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import adapters
from anisora_jax.experiment.parts import saved_config
from anisora_jax.models import names
from anisora_jax.models.wan import published
from anisora_jax.models.wan.names import entries
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh as meshes

# The two experts of Wan 2.2 A14B: the first sees noisy latents, the second goes on where the boundary is crossed.
EXPERTS = ("high_noise", "low_noise")
FOLDERS = [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"), EXPERTS]
SIZE = "size.json"  # in a folder of our format, beside PARAMS
PARAMS = "params"
FROM_PARAMS = "ours"
EXACT = np.dtype(np.float32)


@dataclass(frozen=True)
class Source:
  """The weights of one transformer. naming: "native", "diffusers", or "ours" for arrays by our paths.

  checkpoint: for ours, the arguments that `leaves` takes to find them.
  """

  where: Path
  naming: str
  size: Size
  tensors: Mapping[str, Tensor]
  checkpoint: tuple[Path, str, str] | None = None

  def torch(self, naming: str) -> dict[str, Tensor]:
    """The tensors by their PyTorch names in another naming, none of them read."""
    here, there = entries(self.size, "native" if self.checkpoint else self.naming), entries(self.size, naming)
    if not self.checkpoint:
      # In the order of the source: one that is made of arrays of ours comes array by array.
      renamed = {old.name: new.name for old, new in zip(here, there, strict=True)}
      return {renamed[name]: tensor for name, tensor in self.tensors.items()}
    # Array by array, so that each is read once.
    return {entry.name: Made(self.tensors[entry.path].dtype, entry.torch_shape(), partial(_taken, self.tensors, entry))
            for entry in sorted(there, key=lambda entry: entry.path)}

  def with_adapters(self, found: Mapping[str, np.ndarray], scale: float, dtype: np.dtype | None) -> "Source":
    """These weights with adapters added as they are read (see `adapters.merge`)."""
    naming = "native" if self.checkpoint else self.naming
    tensors = adapters.merge(self.torch(naming), entries(self.size, naming), found, scale, dtype)
    return replace(self, naming=naming, tensors=tensors, checkpoint=None)


def _taken(arrays: Mapping[str, Tensor], entry: names.Entry) -> np.ndarray:
  return entry.to_torch(arrays[entry.path].view())


def find(path: Path, ema: bool = False, dtype: np.dtype | None = None) -> dict[str, Source]:
  """The transformer at `path` as {"": source}, or its two experts by name. Names and shapes are all checked.

  ema: of a run the averaged parameters. dtype: of what is computed here, which are the weights that a run's adapters
  change; by default that of its base. Raises BadInput.
  """
  path = Path(path)
  if not path.exists():
    raise BadInput(f"{path} does not exist: give a weight file, or the folder of weights or of a run.")
  if (path / "checkpoints").is_dir():
    return {"": _run(path, ema, dtype)}
  if ema:
    raise BadInput(f"{path} is no folder of a run, which alone has averaged parameters: leave out --ema.")
  places = _experts(path) if path.is_dir() else {"": path}
  found = {name: _source(place) for name, place in places.items()}
  sizes = {published.title(source.size) for source in found.values()}
  if len(sizes) > 1:
    raise BadInput(f"{path} holds two experts that are not alike: {' and '.join(sorted(sizes))}.")
  return found


def _experts(folder: Path) -> dict[str, Path]:
  """Where the weights in a published folder lie."""
  for pair in FOLDERS:
    there = [(folder / name).is_dir() for name in pair]
    if all(there):
      return {expert: folder / name for expert, name in zip(EXPERTS, pair, strict=True)}
    if any(there) and (pair[0] != "transformer" or not there[0]):
      raise BadInput(f"{folder} holds {pair[there.index(True)]} and no {pair[there.index(False)]}: fetch it, or give "
                     "the folder of the one expert.")
    if there[0]:
      return {"": folder / pair[0]}
  files = [[path for path in folder.glob("*.safetensors") if expert in path.name] for expert in EXPERTS]
  if all(len(found) == 1 for found in files):
    return {expert: found[0] for expert, found in zip(EXPERTS, files, strict=True)}
  return {"": folder}


def _source(place: Path) -> Source:
  if (place / SIZE).is_file():
    leaves.check(place / PARAMS)
    try:
      size = Size(**json.loads((place / SIZE).read_text()))
    except (ValueError, TypeError):
      raise BadInput(f"{place / SIZE} cannot be read: convert the weights again.") from None
    return _ours(place, size, (place / PARAMS, leaves.ITEM, "params"))
  stored = weights.find(place)
  try:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    prefix, naming = published.prefix_and_naming(shapes)
    # A name without the prefix is told as a leftover, even if it would be a good one.
    tensors = {name.removeprefix(prefix) if name.startswith(prefix) else f"{name} (without {prefix})": tensor
               for name, tensor in stored.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = _config(place if place.is_dir() else place.parent)
    size = published.size_of(shapes, naming, config)
    names.check_torch(shapes, entries(size, naming))
    layers = config.get("num_layers", size.layers)
    if layers != size.layers:
      raise BadInput(f"config.json tells of {layers} layers and there are {size.layers}: fetch all of its files.")
  except BadInput as mistake:
    raise BadInput(f"{place}: {mistake}") from None
  return Source(place, naming, size, tensors)


def _config(folder: Path) -> dict[str, Any]:
  """The config.json beside published weights, if there is one of theirs."""
  path = folder / "config.json"
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text())
  except ValueError:
    raise BadInput("its config.json cannot be read: fetch it again.") from None
  known = ("WanModel", "WanTransformer3DModel")
  return config if isinstance(config, dict) and config.get("_class_name") in known else {}


def _run(folder: Path, ema: bool, dtype: np.dtype | None) -> Source:
  """A run's network; where it trained adapters, the weights beside which it did, with the adapters added."""
  config = saved_config(folder)
  size = pick(SIZES, config.model.size, "model size")
  if config.lora.rank:
    try:
      base = source(Path(config.model.weights), size, dtype=dtype)
    except BadInput as mistake:
      raise BadInput(f"{folder} holds adapters, and of the weights beside which they were trained: {mistake}") from None
    _, lora, found = adapters.of_run(folder, config, ema)
    return replace(base.with_adapters(found, lora.scale, dtype), where=folder)
  checkpoint = Checkpoints(folder / "checkpoints").newest()
  return _ours(folder, size, (checkpoint, "state", "ema" if ema else "params"))


def _ours(where: Path, size: Size, checkpoint: tuple[Path, str, str]) -> Source:
  arrays = leaves.find(*checkpoint)
  try:
    names.check_ours({path: array.shape for path, array in arrays.items()}, entries(size, "native"))
  except BadInput as mistake:
    raise BadInput(f"{where}: {mistake}") from None
  return Source(where, FROM_PARAMS, size, arrays, checkpoint)


def write_ours(source: Source, folder: Path, dtype: np.dtype | None) -> None:
  """Makes a folder of our format: SIZE and PARAMS. Holds the whole model in memory. Raises OSError."""
  if source.checkpoint:
    arrays = {path: weights.cast(array.view(), dtype or array.dtype) for path, array in source.tensors.items()}
  else:
    parts = weights.by_path(entries(source.size, source.naming))
    kinds = {path: source.tensors[part[0].name].dtype for path, part in parts.items()}
    arrays = {path: weights.cast(weights.array(source.tensors, part, kinds[path]), dtype or kinds[path])
              for path, part in parts.items()}
  leaves.write(folder / PARAMS, unflatten_dict(arrays, sep="/"))
  for path, stored in leaves.find(folder / PARAMS).items():
    if stored.dtype != arrays[path].dtype or stored.view().tobytes() != arrays[path].tobytes():
      raise spoilt(path)
  (folder / SIZE).write_text(json.dumps(asdict(source.size), indent=2) + "\n")


def spoilt(name: str) -> BadInput:
  return BadInput(f"{name} was not read back as it was written: disk or memory may be failing; nothing was kept.")


def source(path: Path, size: Size, expert: str = "", ema: bool = False,
           dtype: np.dtype | None = EXACT) -> Source:
  """The weights of any format for a network of this size; nothing is read but names and shapes.

  expert: which of two. dtype: as of `find`. Raises BadInput, also for weights of another size.
  """
  found = find(path, ema, dtype)
  if expert not in found:
    raise BadInput(f"{path} holds two experts: say which, {' or '.join(found)}." if not expert else
                   f"{path} holds no expert {expert}: give the folder of both.")
  made = found[expert]
  if names.shapes(entries(made.size, "native")) != names.shapes(entries(size, "native")):
    raise BadInput(f"{path} holds {published.title(made.size)} and the model is {published.title(size)}: choose that "
                   "size, or other weights.")
  return made


def read(made: Source, abstract: PyTree) -> PyTree:
  """Puts weights onto the mesh, an array at a time; each host reads what its devices hold.

  abstract: our parameters as jax.ShapeDtypeStruct with shardings; their dtypes are what the weights become.
  """
  if made.checkpoint:
    return leaves.to_mesh(made.checkpoint[0], abstract, *made.checkpoint[1:])
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not meshes.leads()) as bar:
    return weights.to_mesh(made.tensors, entries(made.size, made.naming), abstract, bar.update)
