"""The PyTorch names and layouts of the text and image encoders' parameters, both ways.

native: models_t5_umt5-xxl-enc-bf16.pth and the `visual.` half of the XLM-R CLIP file, as published with Wan 2.1.
huggingface: transformers' UMT5EncoderModel and CLIPVisionModel, as in the diffusers form of Wan.
"""

import re
from collections.abc import Iterable
from functools import partial
from itertools import chain

from anisora_jax.errors import pick
from anisora_jax.models import names
from anisora_jax.models.wan.image import ImageSize
from anisora_jax.models.wan.text import TextSize

NAMINGS = {"native": 1, "huggingface": 2}  # naming -> its column in the tables
# ours, native, huggingface, layout, shape of our kernel or vector. d width · m mlp · i all heads · a heads ·
# v vocabulary · z buckets
TEXT_RIM = [
  ("embedding", "token_embedding", "shared", "rows", "v d"),
  ("norm", "norm", "encoder.final_layer_norm", "scale", "d"),
]
TEXT_BLOCK = [
  ("attention_norm", "norm1", "layer.0.layer_norm", "scale", "d"),
  ("attention/q", "attn.q", "layer.0.SelfAttention.q", "kernel", "d i"),
  ("attention/k", "attn.k", "layer.0.SelfAttention.k", "kernel", "d i"),
  ("attention/v", "attn.v", "layer.0.SelfAttention.v", "kernel", "d i"),
  ("attention/o", "attn.o", "layer.0.SelfAttention.o", "kernel", "i d"),
  ("attention/distances", "pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias", "rows", "z a"),
  ("mlp_norm", "norm2", "layer.1.layer_norm", "scale", "d"),
  ("mlp/gate", "ffn.gate.0", "layer.1.DenseReluDense.wi_0", "kernel", "d m"),
  ("mlp/up", "ffn.fc1", "layer.1.DenseReluDense.wi_1", "kernel", "d m"),
  ("mlp/down", "ffn.fc2", "layer.1.DenseReluDense.wo", "kernel", "m d"),
]
# p numbers of a patch · 3d the three of attention side by side · i tokens
IMAGE_RIM = [
  ("patch_in", "visual.patch_embedding", "vision_model.embeddings.patch_embedding", "patch", "p d"),
  ("class", "visual.cls_embedding", "vision_model.embeddings.class_embedding", "class", "d"),
  ("positions", "visual.pos_embedding", "vision_model.embeddings.position_embedding", "positions", "i d"),
  ("norm_in", "visual.pre_norm", "vision_model.pre_layrnorm", "norm", "d"),
  ("norm_out", "visual.post_norm", "vision_model.post_layernorm", "norm", "d"),
]
IMAGE_BLOCK = [
  ("attention_norm", "norm1", "layer_norm1", "norm", "d"),
  ("qkv", "attn.to_qkv", "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj", "linear", "d 3d"),
  ("o", "attn.proj", "self_attn.out_proj", "linear", "d d"),
  ("mlp_norm", "norm2", "layer_norm2", "norm", "d"),
  ("mlp/up", "mlp.0", "mlp.fc1", "linear", "d m"),
  ("mlp/down", "mlp.2", "mlp.fc2", "linear", "m d"),
]
LAYOUTS = {
  **names.LAYOUTS,
  "kernel": names.LAYOUTS["linear"][:1],
  "rows": (names.Leaf("", ".weight"),),
}
# What files hold beside the tensors of our tables: CLIP's text half and projection, counts of older transformers.
UNUSED = re.compile(r"textual\.|log_scale$|visual\.head$|(vision_model\.)?embeddings\.position_ids$")
# transformers 5 saves CLIP's image half without the prefix that all published files have.
BARE = re.compile(r"(embeddings|pre_layrnorm|post_layernorm|encoder\.layers)\.")
COPY, SHARED = "encoder.embed_tokens.weight", "shared.weight"  # one tensor; a file may have either name, or both


def used(found: Iterable[str]) -> dict[str, str]:
  """The names in an encoder's file that its table wants -> their names there; strange ones stay and are refused."""
  found = [name for name in found if not UNUSED.match(name)]
  if SHARED in found:
    found = [name for name in found if name != COPY]
  return {name: SHARED if name == COPY else f"vision_model.{name}" if BARE.match(name) else name for name in found}


def text_entries(size: TextSize, naming: str) -> list[names.Entry]:
  """Every tensor of a umT5 encoder of this size, rim first, then block by block. naming: a key of NAMINGS."""
  column = pick(NAMINGS, naming, "naming")
  letters = {"d": size.width, "m": size.mlp, "i": size.heads * size.head_width, "a": size.heads,
             "v": size.vocabulary, "z": size.buckets}
  make = partial(names.entries, column=column, letters=letters, layouts=LAYOUTS)
  start = "blocks." if naming == "native" else "encoder.block."
  blocks = (make(TEXT_BLOCK, ours="blocks/", theirs=f"{start}{number}.", layer=(number, size.layers))
            for number in range(size.layers))
  return [*make(TEXT_RIM), *chain.from_iterable(blocks)]


def image_entries(size: ImageSize, naming: str) -> list[names.Entry]:
  """Every tensor of a CLIP image encoder of this size, rim first, then block by block. naming: a key of NAMINGS."""
  column, native = pick(NAMINGS, naming, "naming"), naming == "native"
  p = size.patch
  letters = {"d": size.width, "3d": 3 * size.width, "m": size.mlp, "p": 3 * p**2, "i": size.tokens}
  layouts = {
    **LAYOUTS,
    "patch": (names.leaf("", ".weight", "(c p q) d -> d c p q", p=p, q=p),),
    "class": (names.leaf("", "", "d -> 1 1 d" if native else "d -> d"),),
    "positions": (names.leaf("", "", "i d -> 1 i d") if native else names.Leaf("", ".weight"),),
  }
  make = partial(names.entries, column=column, letters=letters, layouts=layouts)
  start, last = "visual.transformer." if native else "vision_model.encoder.layers.", size.layers - 1
  blocks = (make(IMAGE_BLOCK, ours="blocks/", theirs=f"{start}{number}.", layer=(number, last))
            for number in range(last))
  return [*make(IMAGE_RIM), *chain.from_iterable(blocks), *make(IMAGE_BLOCK, ours="last/", theirs=f"{start}{last}.")]
