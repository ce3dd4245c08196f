"""Wan 2.1 image-to-video 14B: the first frame is given, by mask, latents and CLIP tokens.

  python -m anisora_jax.encode --config configs/wan21_i2v_14b.py --config.pretrained=Wan2.1-I2V-14B-480P \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/wan21_i2v_14b.py:lora --config.pretrained=Wan2.1-I2V-14B-480P \\
    --config.data.records=out/latents --workdir out/i2v
  python -m anisora_jax.sample --workdir out/i2v --first a.png --prompt "..." --out film

Mesh: fsdp = 8 on 8 H200; on 64 v5p fsdp = 16, seq = 4 with kernel splash. Memory of a device in GiB, by --dry_run
--target h200:8: full 77.8, lora 41.3; full with --config.data.buckets=81x720x1280@1/8, one clip shared by all 8: 53.0.
--target v5p:4x4x4, 16 clips of 81x720x1280, full, with model.remat=full and model.attention=ring: 19.4.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from anisora_jax.sampling.prompts import NEGATIVES
from configs import wan


def get_config(mode: str = "full") -> ConfigDict:
  config = wan.recipe("wan21_i2v_14b", mode, "81x480x832@8")
  wan.only(config, first=1.0)
  config.loss.drop_condition = 0.0  # it was never asked without a picture
  config.sample.shift = 3.0  # at 480p, as published; 720p: --shift 5
  config.sample.negative = NEGATIVES["wan21_i2v"]
  return config
