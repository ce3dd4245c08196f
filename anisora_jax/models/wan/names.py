"""Each Wan parameter's PyTorch names (native and diffusers) and layout, both ways.

Ours stack the blocks on axis 0; theirs number them. From: the checkpoints of Wan 2.1 and 2.2 and of
diffusers.WanTransformer3DModel. Note native `norm3`, the norm before cross-attention, which diffusers calls `norm2`.
"""

from functools import partial
from itertools import chain

from anisora_jax.errors import pick
from anisora_jax.models import names
from anisora_jax.models.wan.sizes import Size

NAMINGS = {"native": 1, "diffusers": 2}  # naming -> its column in the table

# ours, native, diffusers, layout, shape of our kernel or vector. d width · m mlp · e text width · y image width ·
# u waves · i, o numbers of a patch, in and out · j image tokens with positions
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
# Only where image tokens have positions (Wan 2.1 first and last frame to video).
POSITION_RIM = [
  ("image/positions", "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed", "modulation", "j y"),
]
IMAGE_BLOCK = [
  ("cross_attention/k_image", "cross_attn.k_img", "attn2.add_k_proj", "linear", "d d"),
  ("cross_attention/v_image", "cross_attn.v_img", "attn2.add_v_proj", "linear", "d d"),
  ("cross_attention/norm_k_image", "cross_attn.norm_k_img", "attn2.norm_added_k", "scale", "d"),
]


def entries(size: Size, naming: str) -> list[names.Entry]:
  """Every tensor of a transformer of this size, rim first, then block by block. naming: "native" or "diffusers"."""
  column, p = pick(NAMINGS, naming, "naming"), size.patch
  letters = {"d": size.width, "6d": 6 * size.width, "m": size.mlp, "e": size.text_width, "y": size.image_width,
             "u": size.waves, "i": p**2 * (size.channels + size.given), "o": p**2 * size.channels, "2": 2, "6": 6,
             "j": size.image_positions}
  patch = names.leaf("/kernel", ".weight", "(c p q) d -> d c 1 p q", p=p, q=p)
  make = partial(names.entries, column=column, letters=letters,
                 layouts={**names.LAYOUTS, "patch": (patch, names.BIAS)})
  rim, block = (RIM + IMAGE_RIM, BLOCK + IMAGE_BLOCK) if size.image_width else (RIM, BLOCK)
  rim = rim + POSITION_RIM if size.image_positions else rim
  blocks = (make(block, ours="blocks/", theirs=f"blocks.{number}.", layer=(number, size.layers))
            for number in range(size.layers))
  return [*make(rim), *chain.from_iterable(blocks)]
