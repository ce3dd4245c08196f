"""What published Wan files tell of the transformer in them: its naming, its size, its config.json.

Names and shapes fix everything but the heads, which are 128 wide in all that is published, and the text tokens, 512;
a config.json says them where they are otherwise.
"""

import re
from collections.abc import Mapping
from typing import Any

from anisora_jax.errors import BadInput, pick
from anisora_jax.models import names
from anisora_jax.models.wan.names import BLOCK, IMAGE_RIM, NAMINGS, POSITION_RIM, RIM
from anisora_jax.models.wan.sizes import SIZES, Size

HEAD = 128
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")  # ComfyUI's, in front of native names
SIGNS = {"native": ".self_attn.q.weight", "diffusers": ".attn1.to_q.weight"}
# What publishers may keep in float32 beside matrices of 16 bits: what the network computes in float32 anyway.
WIDE = re.compile(r"modulation|norm|time_|positions|patch_in|head/")
Shapes = Mapping[str, tuple[int, ...]]


def prefix_and_naming(found: Shapes) -> tuple[str, str]:
  """What every name begins with, and the naming of the rest. Raises BadInput for what is no Wan transformer."""
  for naming, sign in SIGNS.items():
    name = f"blocks.0{sign}"
    for prefix in PREFIXES:
      if prefix + name in found or any(key.startswith(f"{prefix}blocks.") and key.endswith(sign) for key in found):
        return prefix, naming
  first = ", ".join(sorted(found)[:3])
  raise BadInput(f"these are not the weights of a Wan transformer: their names are {first} and the like.")


def size_of(found: Shapes, naming: str, config: Mapping[str, Any]) -> Size:
  """The size of the transformer that has tensors of these names and shapes.

  config: of the config.json beside them, {} without one. Raises BadInput naming a tensor that is missed; the rest of
  the names and shapes remains to be compared with the table of this size.
  """
  column = pick(NAMINGS, naming, "naming")
  rows = {row[0]: row for row in [*RIM, *IMAGE_RIM, *POSITION_RIM]} | {f"blocks/{row[0]}": row for row in BLOCK}

  def shape(path: str, dims: int, ending: str = ".weight") -> tuple[int, ...]:
    name = ("blocks.0." if path.startswith("blocks/") else "") + rows[path][column] + ending
    names.refuse([name] if name not in found else [], list(found), "missing tensors")
    if len(found[name]) != dims:
      raise BadInput(f"{name} has shape {tuple(found[name])}, and a Wan transformer's has {dims} dimensions.")
    return tuple(found[name])

  def has(path: str, ending: str = ".weight") -> bool:
    return rows[path][column] + ending in found

  def told(*keys: str) -> int | None:
    value = next((config[key] for key in keys if key in config), None)
    if value is not None and (not isinstance(value, int) or value < 1):
      raise BadInput(f"config.json says {keys[0]} = {value!r}, which is no number of them: mend it.")
    return value

  numbers = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, found) if match]
  width, seen, _, patch, _ = shape("patch_in", 5)
  channels = shape("head/out", 2)[0] // patch**2
  heads = told("num_attention_heads", "num_heads")
  if heads is None and width % HEAD:
    raise BadInput(f"a width of {width} does not divide into heads of {HEAD}: put the config.json that tells the heads "
                   "beside the weights.")
  return Size(
    layers=min(1 + max(numbers), len(found)), width=width, heads=heads or width // HEAD,
    mlp=shape("blocks/mlp/up", 2)[0], channels=channels, given=seen - channels, text_width=shape("text/up", 2)[1],
    text_tokens=told("text_len") or Size.text_tokens,
    image_width=shape("image/norm_in", 1)[0] if has("image/norm_in") else 0,
    image_positions=shape("image/positions", 3, "")[1] if has("image/positions", "") else 0,
    waves=shape("time_in", 2)[1], patch=patch)


def title(size: Size) -> str:
  """The names that a size has here, or its numbers: "wan21_t2v_14b or wan22_t2v_a14b"."""
  return " or ".join(name for name, other in SIZES.items() if other == size) or f"a custom size, {size}"


def diffusers_config(size: Size) -> dict[str, Any]:
  """The config.json that diffusers.WanTransformer3DModel.from_pretrained reads."""
  return {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0",
    "added_kv_proj_dim": size.width if size.image_width else None, "attention_head_dim": size.head_width,
    "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": size.mlp, "freq_dim": size.waves,
    "image_dim": size.image_width or None, "in_channels": size.channels + size.given, "num_attention_heads": size.heads,
    "num_layers": size.layers, "out_channels": size.channels, "patch_size": [1, size.patch, size.patch],
    "pos_embed_seq_len": size.image_positions or None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "text_dim": size.text_width}


def native_config(size: Size) -> dict[str, Any]:
  """The config.json that WanModel.from_pretrained of Wan 2.1 and 2.2 reads."""
  kind = "flf2v" if size.image_positions else "i2v" if size.given else "ti2v" if size.channels == 48 else "t2v"
  return {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": size.width, "eps": 1e-6, "ffn_dim": size.mlp,
    "freq_dim": size.waves, "in_dim": size.channels + size.given, "model_type": kind, "num_heads": size.heads,
    "num_layers": size.layers, "out_dim": size.channels, "text_len": size.text_tokens}
