"""Wan 2.1 image-to-video 14B: the first frame is given, by mask, latents and CLIP tokens.

  python -m anisora_jax.encode --config configs/wan21_i2v_14b.py --config.pretrained=Wan2.1-I2V-14B-480P \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/wan21_i2v_14b.py:lora --config.pretrained=Wan2.1-I2V-14B-480P \\
    --config.data.records=out/latents --workdir out/i2v
  python -m anisora_jax.sample --workdir out/i2v --first a.png --prompt "..." --out film

Mesh: fsdp = 8 on 8 H200; on a slice of v5p fsdp = 16, seq = 4 with kernel splash. Memory of a device, by --dry_run
--target h200:8: full 78.2 GiB, lora 43.1 GiB; v5p:4x4x4 at 16 clips, before cross-attention was worked twice: full
38.2 GiB, lora 20.1 GiB.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from anisora_jax.sampling.prompts import NEGATIVES
from configs import wan


def get_config(mode: str = "full") -> ConfigDict:
  config = wan.recipe("wan21_i2v_14b", mode, "81x480x832@8")
  wan.only(config, first=1.0)
  config.loss.drop_condition = 0.0  # it was never asked without a picture
  config.sample.negative = NEGATIVES["wan21_i2v"]
  return config
