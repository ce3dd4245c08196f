"""Each Wan parameter's PyTorch names (native and diffusers) and layout, both ways.

Ours stack the blocks on axis 0; theirs number them. From: the checkpoints of Wan 2.1 and 2.2 and of
diffusers.WanTransformer3DModel. Note native `norm3`, the norm before cross-attention, which diffusers calls `norm2`.
"""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from anisora_jax.errors import BadInput, pick
from anisora_jax.models.wan.sizes import Size

NAMINGS = {"native": 1, "diffusers": 2}  # naming -> its column in the table

# ours, native, diffusers, layout, shape of our kernel or vector. d width · m mlp · e text width · y image width ·
# u waves · i, o numbers of a patch, in and out
RIM = [
  ("patch_in", "patch_embedding", "patch_embedding", "patch", "i d"),
  ("time_in", "time_embedding.0", "condition_embedder.time_embedder.linear_1", "linear", "u d"),
  ("time_out", "time_embedding.2", "condition_embedder.time_embedder.linear_2", "linear", "d d"),
  ("time_modulation", "time_projection.1", "condition_embedder.time_proj", "linear", "d 6d"),
  ("text/up", "text_embedding.0", "condition_embedder.text_embedder.linear_1", "linear", "e d"),
  ("text/down", "text_embedding.2", "condition_embedder.text_embedder.linear_2", "linear", "d d"),
  ("head/modulation", "head.modulation", "scale_shift_table", "modulation", "2 d"),
  ("head/out", "head.head", "proj_out", "linear", "d o"),
]
BLOCK = [
  ("modulation", "modulation", "scale_shift_table", "modulation", "6 d"),
  ("self_attention/q", "self_attn.q", "attn1.to_q", "linear", "d d"),
  ("self_attention/k", "self_attn.k", "attn1.to_k", "linear", "d d"),
  ("self_attention/v", "self_attn.v", "attn1.to_v", "linear", "d d"),
  ("self_attention/o", "self_attn.o", "attn1.to_out.0", "linear", "d d"),
  ("self_attention/norm_q", "self_attn.norm_q", "attn1.norm_q", "scale", "d"),
  ("self_attention/norm_k", "self_attn.norm_k", "attn1.norm_k", "scale", "d"),
  ("cross_norm", "norm3", "norm2", "norm", "d"),
  ("cross_attention/q", "cross_attn.q", "attn2.to_q", "linear", "d d"),
  ("cross_attention/k", "cross_attn.k", "attn2.to_k", "linear", "d d"),
  ("cross_attention/v", "cross_attn.v", "attn2.to_v", "linear", "d d"),
  ("cross_attention/o", "cross_attn.o", "attn2.to_out.0", "linear", "d d"),
  ("cross_attention/norm_q", "cross_attn.norm_q", "attn2.norm_q", "scale", "d"),
  ("cross_attention/norm_k", "cross_attn.norm_k", "attn2.norm_k", "scale", "d"),
  ("mlp/up", "ffn.0", "ffn.net.0.proj", "linear", "d m"),
  ("mlp/down", "ffn.2", "ffn.net.2", "linear", "m d"),
]
# Only where image tokens are used (Wan 2.1 image-to-video).
IMAGE_RIM = [
  ("image/norm_in", "img_emb.proj.0", "condition_embedder.image_embedder.norm1", "norm", "y"),
  ("image/mlp/up", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "linear", "y y"),
  ("image/mlp/down", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "linear", "y d"),
  ("image/norm_out", "img_emb.proj.4", "condition_embedder.image_embedder.norm2", "norm", "d"),
]
IMAGE_BLOCK = [
  ("cross_attention/k_image", "cross_attn.k_img", "attn2.add_k_proj", "linear", "d d"),
  ("cross_attention/v_image", "cross_attn.v_img", "attn2.add_v_proj", "linear", "d d"),
  ("cross_attention/norm_k_image", "cross_attn.norm_k_img", "attn2.norm_added_k", "scale", "d"),
]


class Leaf(NamedTuple):
  """One array of a layer: how it ends in our path and in theirs, and its layout each way (argument: the patch)."""

  ours: str
  theirs: str
  to_torch: Callable[[np.ndarray, int], np.ndarray] = lambda x, p: x
  from_torch: Callable[[np.ndarray, int], np.ndarray] = lambda x, p: x


def _transpose(x: np.ndarray, p: int) -> np.ndarray:
  return x.T


LAYOUTS = {
  "linear": (Leaf("/kernel", ".weight", _transpose, _transpose), Leaf("/bias", ".bias")),
  "patch": (Leaf("/kernel", ".weight", lambda x, p: rearrange(x, "(c p q) d -> d c 1 p q", p=p, q=p),
                 lambda x, p: rearrange(x, "d c 1 p q -> (c p q) d", p=p, q=p)), Leaf("/bias", ".bias")),
  "norm": (Leaf("/scale", ".weight"), Leaf("/bias", ".bias")),
  "scale": (Leaf("/scale", ".weight"),),
  "modulation": (Leaf("", "", lambda x, p: x[None], lambda x, p: x[0]),),
}


class Entry(NamedTuple):
  """One PyTorch tensor: its name, our path, its block (None outside the blocks), layout and shape in our layout."""

  name: str
  path: str
  block: int | None
  leaf: Leaf
  shape: tuple[int, ...]


def entries(size: Size, naming: str) -> Iterator[Entry]:
  """Every tensor of a transformer of this size, rim first, then block by block."""
  column = pick(NAMINGS, naming, "naming")
  letters = {"d": size.width, "6d": 6 * size.width, "m": size.mlp, "e": size.text_width, "y": size.image_width,
             "u": size.waves, "i": size.patch**2 * (size.channels + size.given), "o": size.patch**2 * size.channels,
             "2": 2, "6": 6}
  rim, block = (RIM + IMAGE_RIM, BLOCK + IMAGE_BLOCK) if size.image_width else (RIM, BLOCK)
  parts = [("", "", None, rim)] + [("blocks/", f"blocks.{number}.", number, block) for number in range(size.layers)]
  for ours, theirs, number, rows in parts:
    for row in rows:
      shape = tuple(letters[letter] for letter in row[4].split())
      for leaf in LAYOUTS[row[3]]:
        yield Entry(theirs + row[column] + leaf.theirs, ours + row[0] + leaf.ours, number, leaf,
                    shape[-1:] if leaf.ours == "/bias" else shape)


def _torch_shape(entry: Entry, patch: int) -> tuple[int, ...]:
  return entry.leaf.to_torch(np.broadcast_to(np.float32(0), entry.shape), patch).shape


def table(size: Size, naming: str) -> dict[str, tuple[int, ...]]:
  """The name and shape of every PyTorch tensor of a transformer of this size."""
  return {entry.name: _torch_shape(entry, size.patch) for entry in entries(size, naming)}


def _refuse(strange: list[str], allowed: list[str], what: str) -> None:
  """Raises BadInput for names of one side that the other side lacks, with the nearest name there is."""
  if strange:
    near = get_close_matches(strange[0], allowed, n=1, cutoff=0)
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    raise BadInput(f"{what}: {strange[0]}{more}; the nearest name here is {near[0] if near else 'none'}: "
                   "check the size and the naming.")


def _refuse_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
  if got != wanted:
    raise BadInput(f"{name} has shape {got} and this size wants {wanted}: choose the size it was made with.")


def to_torch(params: Mapping, size: Size, naming: str) -> dict[str, np.ndarray]:
  """Our parameter tree as PyTorch tensors, float32.

  naming: "native" or "diffusers". Raises BadInput for leftovers, gaps and shapes that are not of this size.
  """
  flat, wanted = flatten_dict(params, sep="/"), list(entries(size, naming))
  paths = list(dict.fromkeys(entry.path for entry in wanted))
  _refuse([path for path in flat if path not in set(paths)], paths, "parameters that no table row names")
  _refuse([path for path in paths if path not in flat], list(flat), "missing parameters")
  tensors = {}
  for entry in wanted:
    stack = () if entry.block is None else (size.layers,)
    _refuse_shape(entry.path, tuple(flat[entry.path].shape), stack + entry.shape)
    x = flat[entry.path] if entry.block is None else flat[entry.path][entry.block]
    tensors[entry.name] = np.ascontiguousarray(entry.leaf.to_torch(np.asarray(x, np.float32), size.patch))
  return tensors


def from_torch(tensors: Mapping[str, np.ndarray], size: Size, naming: str) -> dict:
  """PyTorch tensors as our parameter tree, float32.

  naming: "native" or "diffusers". Raises BadInput for leftovers, gaps and shapes that are not of this size.
  """
  wanted = list(entries(size, naming))
  names = [entry.name for entry in wanted]
  _refuse([name for name in tensors if name not in set(names)], names, "tensors that no table row names")
  _refuse([name for name in names if name not in tensors], list(tensors), "missing tensors")
  flat = {}
  for entry in wanted:
    _refuse_shape(entry.name, tuple(tensors[entry.name].shape), _torch_shape(entry, size.patch))
    if entry.path not in flat:
      flat[entry.path] = np.empty((() if entry.block is None else (size.layers,)) + entry.shape, np.float32)
    flat[entry.path][... if entry.block is None else entry.block] = entry.leaf.from_torch(
      np.asarray(tensors[entry.name]), size.patch)
  return unflatten_dict(flat, sep="/")
