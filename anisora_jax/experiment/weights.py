"""Where the weights of a network, or of two experts, lie: files, published folders, runs, converted folders."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree
from tqdm.auto import tqdm

from anisora_jax.checkpoints import leaves, manifest, weights
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.checkpoints.tensor_file import Made, Tensor, cast
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import adapters
from anisora_jax.experiment.runs import saved_config
from anisora_jax.models import names
from anisora_jax.models.wan import published
from anisora_jax.models.wan.published import KINDS, AnySize, Kind
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh as meshes

# The two experts of Wan 2.2 A14B: the first sees noisy latents, the second goes on where the boundary is crossed.
EXPERTS = ("high_noise", "low_noise")
FOLDERS = [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"), EXPERTS]
SIZE = "size.json"  # in a folder of our format, beside PARAMS
PARAMS = "params"
FROM_PARAMS = "ours"
EXACT = np.dtype(np.float32)
TRANSFORMER = KINDS["transformer"]


@dataclass(frozen=True)
class Source:
  """The weights of one network. naming: of the table of its kind, or "ours" for arrays by our paths.

  checkpoint: for ours, the arguments that `leaves` takes to find them. unused: how many tensors of its files Wan does
  not use.
  """

  where: Path
  naming: str
  size: AnySize
  tensors: Mapping[str, Tensor]
  checkpoint: tuple[Path, str, str] | None = None
  kind: Kind = TRANSFORMER
  unused: int = 0

  def entries(self, naming: str = "") -> list[names.Entry]:
    """The table of its tensors in a naming, by default its own, native for ours."""
    return self.kind.entries(self.size, naming or ("native" if self.checkpoint else self.naming))

  def torch(self, naming: str) -> dict[str, Tensor]:
    """The tensors by their PyTorch names in another naming, none of them read."""
    there = self.entries(naming)
    if not self.checkpoint:
      return weights.renamed(self.tensors, self.entries(), there)
    # Array by array, so that each is read once.
    return {entry.name: Made(self.tensors[entry.path].dtype, entry.torch_shape(), partial(_taken, self.tensors, entry))
            for entry in sorted(there, key=lambda entry: entry.path)}

  def with_adapters(self, found: Mapping[str, np.ndarray], scale: float, dtype: np.dtype | None) -> "Source":
    """These weights with adapters added as they are read (see `adapters.merge`)."""
    naming = "native" if self.checkpoint else self.naming
    tensors = adapters.merge(self.torch(naming), self.entries(naming), found, scale, dtype)
    return replace(self, naming=naming, tensors=tensors, checkpoint=None)


def _taken(arrays: Mapping[str, Tensor], entry: names.Entry) -> np.ndarray:
  return entry.to_torch(arrays[entry.path].view())


def find(path: Path, ema: bool = False, dtype: np.dtype | None = None,
         kinds: Sequence[Kind] = (TRANSFORMER,)) -> dict[str, Source]:
  """The network at `path` as {"": source}, or two experts by name. Names and shapes are all checked.

  ema: of a run the averaged parameters. dtype: of weights that are stored in eight bits, by default bfloat16. kinds: of
  networks that it may be. Raises BadInput.
  """
  path = Path(path)
  if not path.exists():
    raise BadInput(f"{path} does not exist: give a weight file, or the folder of weights, of a run or of one of "
                   "its checkpoints.")
  if (path / "checkpoints").is_dir():
    return {"": _run(path, ema)}
  if path.parent.name == "checkpoints" and (path / manifest.NAME).is_file():
    return {"": _run(path.parent.parent, ema, int(path.name))}
  if ema:
    raise BadInput(f"{path} is no folder of a run, which alone has averaged parameters: leave out --ema.")
  places = _experts(path) if path.is_dir() else {"": path}
  found = {name: _source(place, kinds, dtype or weights.BFLOAT16) for name, place in places.items()}
  sizes = {published.title(source.kind, source.size) for source in found.values()}
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


def _source(place: Path, kinds: Sequence[Kind], dtype: np.dtype) -> Source:
  if (place / SIZE).is_file():
    leaves.check(place / PARAMS)
    try:
      size = Size(**json.loads((place / SIZE).read_text()))
    except (ValueError, TypeError):
      raise BadInput(f"{place / SIZE} cannot be read: convert the weights again.") from None
    return _ours(place, size, (place / PARAMS, leaves.ITEM, "params"))
  stored = weights.find(place, dtype)
  try:
    kind, naming, known = published.recognise(stored)
    if kind not in kinds:
      raise BadInput(f"these are the weights of a Wan {kind.noun} and those of a {kinds[0].noun} are wanted: give "
                     "another file.")
    tensors = {known[name]: tensor for name, tensor in stored.items() if name in known}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    size = kind.size_of(shapes, naming, _config(place if place.is_dir() else place.parent, kind))
    names.check_torch(shapes, kind.entries(size, naming))
  except BadInput as mistake:
    raise BadInput(f"{place}: {mistake}") from None
  return Source(place, naming, size, tensors, kind=kind, unused=len(stored) - len(tensors))


def _config(folder: Path, kind: Kind) -> dict[str, Any]:
  """The config.json beside published weights, if there is one of theirs."""
  path = folder / "config.json"
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text())
  except ValueError:
    raise BadInput("its config.json cannot be read: fetch it again.") from None
  told = isinstance(config, dict) and {config.get("_class_name"), config.get("model_type")} & set(kind.configs)
  return config if told else {}


def _run(folder: Path, ema: bool, step: int = 0) -> Source:
  """step: of the checkpoint, 0 for the newest."""
  config = saved_config(folder)
  if config.lora.rank:
    raise BadInput(f"{folder} holds adapters and no whole network: convert it to the format ours, which adds them to "
                   "the weights beside which they were trained, and give that.")
  size = pick(SIZES, config.model.size, "model size")
  checkpoints = Checkpoints(folder / "checkpoints")
  checkpoint = checkpoints.whole(step) if step else checkpoints.newest()
  return _ours(folder, size, (checkpoint, "state", "ema" if ema else "params"))


def _ours(where: Path, size: Size, checkpoint: tuple[Path, str, str]) -> Source:
  arrays = leaves.find(*checkpoint)
  try:
    names.check_ours({path: array.shape for path, array in arrays.items()}, TRANSFORMER.entries(size, "native"))
  except BadInput as mistake:
    raise BadInput(f"{where}: {mistake}") from None
  return Source(where, FROM_PARAMS, size, arrays, checkpoint)


def write_ours(source: Source, folder: Path, dtype: np.dtype | None) -> None:
  """Makes a folder of our format: SIZE and PARAMS. Holds the whole model in memory. Raises OSError."""
  if source.checkpoint:
    arrays = {path: cast(array.view(), dtype or array.dtype) for path, array in source.tensors.items()}
  else:
    parts = weights.by_path(source.entries())
    kinds = {path: source.tensors[part[0].name].dtype for path, part in parts.items()}
    arrays = {path: cast(weights.array(source.tensors, part, kinds[path]), dtype or kinds[path])
              for path, part in parts.items()}
  leaves.write(folder / PARAMS, unflatten_dict(arrays, sep="/"))
  for path, stored in leaves.find(folder / PARAMS).items():
    if stored.dtype != arrays[path].dtype or stored.view().tobytes() != arrays[path].tobytes():
      raise spoilt(path)
  (folder / SIZE).write_text(json.dumps(asdict(source.size), indent=2) + "\n")


def spoilt(name: str) -> BadInput:
  return BadInput(f"{name} was not read back as it was written: disk or memory may be failing; nothing was kept.")


def source(path: Path, size: AnySize, expert: str = "", dtype: np.dtype | None = EXACT,
           kind: Kind = TRANSFORMER) -> Source:
  """The weights of any format for a network of this size; nothing is read but names and shapes.

  expert: which of two. dtype: as of `find`. Raises BadInput, also for weights of another kind or size.
  """
  found = find(path, dtype=dtype, kinds=(kind,))
  if expert not in found:
    raise BadInput(f"{path} holds two experts: say which, {' or '.join(found)}." if not expert else
                   f"{path} holds no expert {expert}: give the folder of both.")
  made = found[expert]
  alike = names.shapes(made.entries("native")) == names.shapes(kind.entries(size, "native"))
  if not alike or (kind is not TRANSFORMER and made.size != size):  # a codec's means are in no shape
    here, there = (published.title(made.kind, one) for one in (made.size, size))
    raise BadInput(f"{path} holds {here} and the {'model' if kind is TRANSFORMER else kind.noun} is {there}: choose "
                   "that size, or other weights.")
  return made


def read(made: Source, abstract: PyTree) -> PyTree:
  """Puts weights onto the mesh, an array at a time; each host reads what its devices hold.

  abstract: our parameters as jax.ShapeDtypeStruct with shardings; their dtypes are what the weights become.
  """
  if made.checkpoint:
    return leaves.to_mesh(made.checkpoint[0], abstract, *made.checkpoint[1:])
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=not meshes.leads()) as bar:
    return weights.to_mesh(made.tensors, made.entries(), abstract, bar.update)
