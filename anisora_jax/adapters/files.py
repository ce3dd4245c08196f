"""Adapter files as others name them: diffusers, peft, ComfyUI and kohya, both ways.

A tensor is called PREFIX MODULE SUFFIX. `down` [r, i] and `up` [o, r] make the change up @ down, times alpha / r where
there is an alpha; `diff` and `diff_b` are added to weight and bias as they are. From: peft's LoRA layers, diffusers'
lora_conversion_utils.py, kohya's networks/lora.py and ComfyUI's comfy/lora.py.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from anisora_jax.errors import BadInput, pick

Tensors = Mapping[str, np.ndarray]


@runtime_checkable
class Tensor(Protocol):
  """What is needed of a row of a names table (see `models.names.Entry`)."""

  name: str
  path: str
  at: tuple
  whole: tuple[int, ...]
  leaf: object


class Format(NamedTuple):
  """naming: of the modules. prefix: before them. flat: whether dots become underscores. down, up, alpha: suffixes;
  without an alpha the scale is in `up`."""

  naming: str
  prefix: str
  flat: bool
  down: str
  up: str
  alpha: str = ""


FORMATS = {
  "diffusers": Format("diffusers", "transformer.", False, ".lora_A.weight", ".lora_B.weight"),
  "peft": Format("diffusers", "base_model.model.", False, ".lora_A.weight", ".lora_B.weight"),
  "comfyui": Format("native", "diffusion_model.", False, ".lora_down.weight", ".lora_up.weight", ".alpha"),
  "kohya": Format("native", "lora_unet_", True, ".lora_down.weight", ".lora_up.weight", ".alpha"),
}
# Every suffix that is read, longest first where one ends another.
SUFFIXES = {".lora_A.default.weight": "down", ".lora_B.default.weight": "up", ".lora_A.weight": "down",
            ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_B.bias": "diff_b",
            ".alpha": "alpha", ".diff_b": "diff_b", ".diff": "diff"}


def _modules(table: Sequence[Tensor], form: Format) -> dict[str, dict[str, Tensor]]:
  """{module as this format writes it: {"weight": row, "bias": row}}."""
  found: dict[str, dict[str, Tensor]] = {}
  for row in table:
    module, _, end = row.name.rpartition(".")
    if end in ("weight", "bias"):
      found.setdefault(form.prefix + (module.replace(".", "_") if form.flat else module), {})[end] = row
  return found


def _split(name: str) -> tuple[str, str]:
  """(prefix and module, part) of a tensor's name; ("", "") for an unknown suffix."""
  return next(((name.removesuffix(end), part) for end, part in SUFFIXES.items() if name.endswith(end)), ("", ""))


def read(tensors: Tensors, tables: Mapping[str, Sequence[Tensor]], alpha: float | None = None) -> tuple[dict, str]:
  """(adapters, for a scale of 1, f32; name of their format).

  tables: naming -> names table of the base. alpha: of adapters without one of their own, their rank by default. Layers
  without an adapter get zeros. Raises BadInput for tensors whose naming is unknown, that come alone, or that do not fit
  the base.
  """
  form_name, modules = _recognise(list(tensors), tables)
  parts: dict[str, dict[str, np.ndarray]] = {}
  for name, tensor in tensors.items():
    module, part = _split(name)
    parts.setdefault(module, {})[part] = np.asarray(tensor, np.float32)
  for found in parts.values() if alpha is not None else ():
    if "down" in found and "alpha" not in found:  # peft counts the bias of `up` as often as the rest
      scaled = {"diff_b": found["diff_b"] * np.float32(alpha / len(found["down"]))} if "diff_b" in found else {}
      found.update(alpha=np.float32(alpha), **scaled)
  placed: dict[str, list[tuple[Tensor, np.ndarray]]] = {}
  for module, found in parts.items():
    for path, row, array in _ours(module, found, modules[module]):
      placed.setdefault(path, []).append((row, array))
  return unflatten_dict({path: _stack(path, pieces) for path, pieces in placed.items()}, sep="/"), form_name


def _recognise(names: Sequence[str], tables: Mapping[str, Sequence[Tensor]]) -> tuple[str, dict]:
  modules = {name: _modules(tables[form.naming], form) for name, form in FORMATS.items()}
  fits = {name: sum(_split(key)[0] in known for key in names) for name, known in modules.items()}
  best = max(fits, key=lambda name: fits[name])
  strange = [key for key in names if _split(key)[0] not in modules[best]]
  if strange or not names:
    near = get_close_matches(strange[0] if strange else "", list(modules[best]), n=1, cutoff=0)
    raise BadInput(f"{strange[0] if strange else 'an empty file'} is no adapter of this base by the names of "
                   f"{', '.join(FORMATS)}; the nearest module is {near[0] if near else 'none'}: check the base's size.")
  return best, modules[best]


def _ours(module: str, found: Mapping[str, np.ndarray], rows: Mapping[str, Tensor]):
  """(our path, row, array) of each part of one module."""
  row = rows["weight"]
  *_, i, o = (0, *row.whole)
  if "down" in found or "up" in found or "alpha" in found:
    if not {"down", "up"} <= set(found):
      raise BadInput(f"{module} has {' and '.join(sorted(found))} alone: an adapter needs down and up.")
    down, up = found["down"], found["up"]
    rank = down.shape[0]
    if not row.path.endswith("/kernel") or down.size != rank * i or up.size != o * rank:
      raise BadInput(f"{module}: down {down.shape} and up {up.shape} do not fit a base of {i} inputs and {o} outputs: "
                     "check the base's size.")
    layer = row.path.removesuffix("kernel")
    yield layer + "lora_a", row, row.leaf.from_torch(down)
    yield layer + "lora_b", row, up.reshape(o, rank).T * np.float32(found.get("alpha", rank) / rank)
  for part, end in (("diff", "weight"), ("diff_b", "bias")):
    if part in found:
      if end not in rows or found[part].shape != rows[end].torch_shape():
        raise BadInput(f"{module} has a {part} of shape {found[part].shape} that does not fit the base: "
                       "check the base's size.")
      yield rows[end].path + "_diff", rows[end], rows[end].leaf.from_torch(found[part])


def _stack(path: str, pieces: Sequence[tuple[Tensor, np.ndarray]]) -> np.ndarray:
  """The layers of one adapter on axis 0; smaller ranks and missing layers are filled with zeros."""
  shape = np.max([array.shape for _, array in pieces], axis=0)
  row = pieces[0][0]
  stack = row.whole[:len(row.at)]
  made = np.zeros((*stack, *shape), np.float32)
  for row, array in pieces:
    made[row.at + tuple(slice(side) for side in array.shape)] = array
  return made


def change(adapters: Mapping[str, np.ndarray], row: Tensor) -> Callable[[], np.ndarray] | None:
  """What makes that which adapters add to a tensor of the base, in its layout, f32; None where they add nothing.

  adapters: by path, for a scale of 1.
  """
  layer, parts = row.path.removesuffix("kernel"), []
  pair = [adapters[layer + name][row.at] for name in ("lora_a", "lora_b") if layer + name in adapters]
  if row.path.endswith("/kernel") and pair and all(x.any() for x in pair):
    a, b = (np.asarray(x, np.float32) for x in pair)
    # The product lies in memory as theirs does: to add numbers against their order takes four times as long.
    parts.append(lambda: np.matmul(b.T, a.T).T)
  if row.path + "_diff" in adapters and adapters[row.path + "_diff"][row.at].any():
    parts.append(lambda: np.asarray(adapters[row.path + "_diff"][row.at], np.float32))
  return (lambda: row.leaf.to_torch(sum(part() for part in parts))) if parts else None


def write(adapters: Mapping, scale: float, tables: Mapping[str, Sequence[Tensor]], format_name: str) -> Tensors:
  """Adapters as tensors of a format, f32; layers that change nothing are left out.

  Raises BadInput for an unknown format, and for `_diff` arrays in a format that has no name for them.
  """
  form = pick(FORMATS, format_name, "adapter format")
  flat, made = flatten_dict(adapters, sep="/"), {}
  for module, rows in _modules(tables[form.naming], form).items():
    for end, part in (("weight", ".diff"), ("bias", ".diff_b")):
      row = rows.get(end)
      if row is not None and row.path + "_diff" in flat:
        if not form.alpha:
          raise BadInput(f"{row.path}_diff has no name in the format {format_name}: take comfyui or kohya, or merge.")
        made[module + part] = np.ascontiguousarray(row.leaf.to_torch(np.asarray(flat[row.path + "_diff"])[row.at]))
    row = rows["weight"]
    layer = row.path.removesuffix("kernel")
    if row.path.endswith("/kernel") and layer + "lora_a" in flat:
      a, b = (np.asarray(flat[layer + name], np.float32)[row.at] for name in ("lora_a", "lora_b"))
      if a.any() or b.any():
        down, up = row.leaf.to_torch(a), b.T * np.float32(1 if form.alpha else scale)
        made[module + form.down] = np.ascontiguousarray(down)
        made[module + form.up] = np.ascontiguousarray(up.reshape(up.shape + (1,) * (down.ndim - 2)))  # convolutions
        if form.alpha:
          made[module + form.alpha] = np.float32(scale * a.shape[-1])
  return made
