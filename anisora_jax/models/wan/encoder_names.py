"""The PyTorch names and layouts of the text and image encoders' parameters, both ways.

native: models_t5_umt5-xxl-enc-bf16.pth and the `visual.` half of the XLM-R CLIP file, as published with Wan 2.1.
huggingface: transformers' UMT5EncoderModel and CLIPVisionModel, as in the diffusers form of Wan.
"""

from functools import partial
from itertools import chain

from anisora_jax.errors import pick
from anisora_jax.models import names
from anisora_jax.models.wan.text import TextSize

NAMINGS = {"native": 1, "huggingface": 2}  # naming -> its column in the tables
# A second name of a tensor that some files store twice -> the name in our table.
COPIES = {"encoder.embed_tokens.weight": "shared.weight"}

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
LAYOUTS = {
  **names.LAYOUTS,
  "kernel": names.LAYOUTS["linear"][:1],
  "rows": (names.Leaf("", ".weight"),),
}


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
