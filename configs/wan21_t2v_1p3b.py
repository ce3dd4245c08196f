"""Wan 2.1 text-to-video 1.3B, the one that a single large GPU tunes whole.

  python -m anisora_jax.encode --config configs/wan21_t2v_1p3b.py --config.pretrained=Wan2.1-T2V-1.3B \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/wan21_t2v_1p3b.py:lora --config.pretrained=Wan2.1-T2V-1.3B \\
    --config.data.records=out/latents --workdir out/t2v
  python -m anisora_jax.sample --workdir out/t2v --prompt "..." --out film

Mesh: one GPU with --config.train.micro_batches=8, or fsdp = -1 over several. Memory of a device, by --dry_run --target
h200:1 at one clip: full 47.6 GiB; h200:8 at eight: full 13.1 GiB, lora 10.7 GiB. By --estimate --target h200:1 at eight
clips: full 45.4 GiB in 8 micro-batches, 112.7 GiB at once.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import wan


def get_config(mode: str = "full") -> ConfigDict:
  config = wan.recipe("wan21_t2v_1p3b", mode, "81x480x832@8")
  wan.only(config, none=1.0)
  config.loss.drop_condition = 0.0
  config.sample.steps = 50
  config.sample.shift = 3.0  # at 480p
  config.times.shift = 3.0
  config.sample.guidance = 6.0
  return config
