"""Adapters that a run has trained, as a file that others load; and of either kind, added to the weights of a base."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from anisora_jax.adapters import files
from anisora_jax.adapters.lora import Lora
from anisora_jax.checkpoints import leaves, tensor_file, weights
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.checkpoints.tensor_file import Made, Tensor
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment.runs import saved_config
from anisora_jax.models.names import Entry
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.models.wan.sizes import SIZES, Size

PREFIX = "lora_"  # format of convert -> PREFIX and a format of adapters.files
FORMATS = tuple(PREFIX + name for name in files.FORMATS)
FILE = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model"}  # what they look for in a folder
ABOUT = "lora_adapter_metadata"  # where the header of diffusers' file has peft's settings
UNREAD = ("use_rslora", "use_dora", "alpha_pattern")  # settings of peft by which the tensors mean something else


def of_run(run: Path, config: ConfigDict, ema: bool) -> tuple[Path, Lora, dict[str, np.ndarray]]:
  """(newest checkpoint; rank and scale; adapters by path, without their scale) of a run that trained some.

  ema: the averaged ones.
  """
  checkpoint = Checkpoints(run / "checkpoints").newest()
  found = leaves.find(checkpoint, "state", "ema" if ema else "params")
  return checkpoint, Lora(**config.lora.to_dict()), {path: array.view() for path, array in found.items()}


def of_file(path: Path, size: Size) -> tuple[str, dict[str, np.ndarray]]:
  """(name of the format; adapters by path, for a scale of 1) in a published file for a network of this size.

  Raises BadInput.
  """
  found = weights.find(path)
  try:
    tables = {naming: entries(size, naming) for naming in NAMINGS}
    tree, form = files.read({name: x.view() for name, x in found.items()}, tables, _alpha(path))
  except BadInput as mistake:
    raise BadInput(f"{path}: {mistake}") from None
  return form, flatten_dict(tree, sep="/")


def _alpha(path: Path) -> float | None:
  """The alpha that peft writes into a file beside its tensors, and diffusers into their header."""
  file = weights.only(path) if path.is_dir() else path
  text, beside = "{}", file.with_name("adapter_config.json")
  if file.stem == FILE["peft"] and beside.is_file():
    text = beside.read_text()
  elif file.suffix == ".safetensors":
    text = tensor_file.metadata(file).get(ABOUT, text)
  try:
    about = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    alpha = about.get("lora_alpha")
    alpha = alpha if alpha is None else float(alpha)
  except (ValueError, TypeError, AttributeError):
    raise BadInput("the settings of peft beside its tensors cannot be read: fetch it again.") from None
  unread = next((key for key in UNREAD if about.get(key)), None)
  if unread:
    raise BadInput(f"it was trained with peft's {unread}, which is not read here: merge it by peft.")
  return alpha


def merge(tensors: Mapping[str, Tensor], rows: Sequence[Entry], adapters: Mapping[str, np.ndarray], scale: float,
          dtype: np.dtype | None = None) -> dict[str, Tensor]:
  """The tensors of a base, to which adapters are added in float32 when they are read.

  rows: the base's table in the naming of its tensors. adapters: by path, counted `scale` times. dtype: of the tensors
  that change, by default that of the base.
  """
  changes = {row.name: files.change(adapters, row) for row in rows}

  def made(tensor: Tensor, change: Callable[[], np.ndarray]) -> Made:
    def add() -> np.ndarray:
      total = tensor.view().astype(np.float32)
      total += scale * change()
      return tensor_file.cast(total, dtype or tensor.dtype)

    return Made(dtype or tensor.dtype, tensor.shape, add)

  return {name: made(tensor, changes[name]) if changes[name] else tensor for name, tensor in tensors.items()}


def export(run: Path, to: Path, form: str, ema: bool, say: Callable[[str], None]) -> Callable[[Path], None]:
  """Reads the adapters of a run and returns what writes them into a folder, which is to be called `to`.

  form: of FORMATS. ema: the averaged ones. Raises BadInput for what is no run of adapters.
  """
  if not (run / "checkpoints").is_dir():
    raise BadInput(f"{run} is no folder of a run: adapters are converted from the --workdir that trained them.")
  config = saved_config(run)
  if not config.lora.rank:
    raise BadInput(f"{run} trained the network itself and no adapters: take the format wan, diffusers or comfyui.")
  checkpoint, lora, arrays = of_run(run, config, ema)
  size, name = pick(SIZES, config.model.size, "model size"), form[len(PREFIX):]
  tables = {naming: entries(size, naming) for naming in NAMINGS}
  tensors = files.write(unflatten_dict(arrays, sep="/"), lora.scale, tables, name)
  say(f"{run}: {len(tensors)} tensors of adapters of rank {lora.rank} after step {checkpoint.name}")

  def write(folder: Path) -> None:
    specs = {key: (x.dtype, x.shape) for key, x in tensors.items()}
    places = tensor_file.create(folder / f"{FILE.get(name, to.name)}.safetensors", specs)
    for key, place in places.items():
      made = Made(place.dtype, place.shape, lambda x=tensors[key]: x)
      if tensor_file.fill(place, made.pieces(memoryview(bytearray(tensor_file.PIECE)))) != tensor_file.crc32(
          place.pieces(memoryview(bytearray(tensor_file.PIECE)))):
        raise OSError(f"{key} was not read back as it was written")
    if name == "peft":  # the scale is in the tensors, so alpha is the rank
      modules = {re.sub(r"^base_model\.model\.(.*)\.lora_[AB]\.weight$", r"\1", key) for key in tensors}
      about = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.rank, "target_modules": sorted(modules)}
      (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")

  return write
