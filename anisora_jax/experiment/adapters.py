"""Adapters that a run has trained, as a file that others load."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from flax.traverse_util import unflatten_dict

from anisora_jax.adapters import files
from anisora_jax.adapters.lora import Lora
from anisora_jax.checkpoints import leaves, tensor_file
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.checkpoints.tensor_file import Made
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment.parts import saved_config
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.models.wan.sizes import SIZES

PREFIX = "lora_"  # format of convert -> PREFIX and a format of adapters.files
FORMATS = tuple(PREFIX + name for name in files.FORMATS)
FILE = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model"}  # what they look for in a folder


def export(run: Path, to: Path, form: str, ema: bool, say: Callable[[str], None]) -> Callable[[Path], None]:
  """Reads the adapters of a run and returns what writes them into a folder, which is to be called `to`.

  form: of FORMATS. ema: the averaged ones. Raises BadInput for what is no run of adapters.
  """
  if not (run / "checkpoints").is_dir():
    raise BadInput(f"{run} is no folder of a run: adapters are converted from the --workdir that trained them.")
  config = saved_config(run)
  if not config.lora.rank:
    raise BadInput(f"{run} trained the network itself and no adapters: take the format wan, diffusers or comfyui.")
  lora, size, name = Lora(**config.lora.to_dict()), pick(SIZES, config.model.size, "model size"), form[len(PREFIX):]
  checkpoint = Checkpoints(run / "checkpoints").newest()
  arrays = {path: array.view() for path, array in
            leaves.find(checkpoint, "state", "ema" if ema else "params").items()}
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
