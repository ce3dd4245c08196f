"""Weights of eight bits, as ComfyUI's files have them: a number times a scale that lies beside them.

The scale of M.weight is M.scale_weight or M.weight_scale, one number or one a row; without one it is 1. A file may also
hold a marker scaled_fp8; M.scale_input or M.input_scale, the range of inputs, which only products in eight bits need;
and M.comfy_quant, bytes of JSON that name the format. From: ComfyUI's QUANTIZATION.md and convert_old_quants of
comfy/utils.py, which names the first spelling old, and kijai/ComfyUI-WanVideoWrapper.
"""

import json
import math
from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from anisora_jax.checkpoints.tensor_file import Made, Tensor, cast
from anisora_jax.errors import BadInput

EIGHT = {np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)}
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"


def widen(tensors: Mapping[str, Tensor], dtype: np.dtype) -> dict[str, Tensor]:
  """The tensors with those of eight bits in another dtype, none of them read, and without what explained them.

  Whatever explains no tensor of eight bits stays. Raises BadInput for scales and formats that are not known.
  """
  small = [name for name, tensor in tensors.items() if tensor.dtype in EIGHT and not _marks(name)]
  made, gone = dict(tensors), {name for name in tensors if small and _marks(name)}
  for name in small:
    module = name.removesuffix(".weight")
    scales = [module + end for end in SCALES if module + end in tensors] if module != name else []
    if len(scales) > 1:
      raise BadInput(f"{name} has two scales, {' and '.join(scales)}: get the file again.")
    scale = _scale(tensors[name], scales[0], tensors[scales[0]]) if scales else None
    if module + ".comfy_quant" in tensors:
      _check_format(module, tensors[module + ".comfy_quant"])
    gone |= {*scales, *(module + end for end in BESIDE if module != name)}
    made[name] = Made(dtype, tensors[name].shape, partial(_value, tensors[name], scale, dtype))
  return {name: tensor for name, tensor in made.items() if name not in gone}


def _marks(name: str) -> bool:
  return name.rpartition(".")[2] == MARKER


def _scale(tensor: Tensor, name: str, scale: Tensor) -> Tensor:
  rows = tensor.shape[:1]
  if math.prod(scale.shape) != 1 and scale.shape not in (rows, (*rows, 1)):
    raise BadInput(f"{name} has shape {scale.shape}, and one number or one for each of {rows[0]} rows can be read: "
                   "take a file in bfloat16.")
  return scale


def _check_format(module: str, told: Tensor) -> None:
  try:
    form = json.loads(told.view().tobytes())["format"]
  except (ValueError, KeyError, TypeError):
    raise BadInput(f"{module}.comfy_quant cannot be read: get the file again.") from None
  if form not in {dtype.name for dtype in EIGHT}:
    raise BadInput(f"{module} is stored as {form}, and {' or '.join(sorted(dtype.name for dtype in EIGHT))} can be "
                   "read: take a file in bfloat16.")


def _value(tensor: Tensor, scale: Tensor | None, dtype: np.dtype) -> np.ndarray:
  made = tensor.view().astype(np.float32)
  if scale is not None:
    made *= np.asarray(scale.view(), np.float32).reshape(-1, *[1] * (made.ndim - 1))
  return cast(made, dtype)
