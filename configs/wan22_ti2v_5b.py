"""Wan 2.2 text- and image-to-video 5B: a given first frame has noise time 0, in place of a mask.

  python -m anisora_jax.encode --config configs/wan22_ti2v_5b.py --config.pretrained=Wan2.2-TI2V-5B \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/wan22_ti2v_5b.py:lora --config.pretrained=Wan2.2-TI2V-5B \\
    --config.data.records=out/latents --workdir out/ti2v
  python -m anisora_jax.sample --workdir out/ti2v --first a.png --prompt "..." --out film

Its codec halves each side once more (4 x 16 x 16, 48 channels), so 5 s of 720p at 24 frames/s are 27,280 tokens.

Mesh: fsdp = 8 on 8 H200. Memory of a device, by --dry_run --target h200:8: full 28.7 GiB, lora 18.2 GiB.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import wan


def get_config(mode: str = "full") -> ConfigDict:
  config = wan.recipe("wan22_ti2v_5b", mode, "121x704x1280@8", codec="wan22")
  wan.only(config, none=0.5, first=0.5)
  config.data.fps = 24.0
  config.times.given = 0.0
  config.sample.multiplier = 0.0
  config.sample.steps = 50
  config.sample.area = 704 * 1280
  config.sample.area_rule = "ti2v"
  return config
