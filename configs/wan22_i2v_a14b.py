"""Wan 2.2 image-to-video A14B: two experts, of which a run tunes one.

  python -m anisora_jax.encode --config configs/wan22_i2v_a14b.py --config.pretrained=Wan2.2-I2V-A14B \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/wan22_i2v_a14b.py:high_lora --config.pretrained=Wan2.2-I2V-A14B \\
    --config.data.records=out/latents --workdir out/high
  python -m anisora_jax.sample --workdir out/high --first a.png --prompt "..." --out film

The word after the config says which: high or low, of the whole expert, high_lora or low_lora of adapters beside it.
The high-noise expert learns noise times from 0.9 up, the low-noise one those below; both read the same latents. A tuned
expert samples beside the other as published; of two expert runs, hand one over by convert --format lora_comfyui, and
add it with --adapters low_noise:FILE.

Mesh: fsdp = 8 on 8 H200. Memory of a device, by --dry_run --target h200:8: high 73.6 GiB, high_lora 42.0 GiB.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import wan

BOUNDARY = 0.9


def get_config(mode: str = "high") -> ConfigDict:
  expert, _, lora = mode.partition("_")
  if expert not in ("high", "low") or lora not in ("", "lora"):
    raise ValueError(f"no mode is named {mode!r}: take high, low, high_lora or low_lora.")
  config = wan.recipe("wan22_i2v_a14b", lora or "full", "81x480x832@8")
  wan.only(config, first=1.0)
  config.loss.drop_condition = 0.0
  config.model.expert = f"{expert}_noise"
  config.times.low, config.times.high = (BOUNDARY, 1.0) if expert == "high" else (0.0, BOUNDARY)
  config.sample.boundary = BOUNDARY
  config.sample.guidance = 3.5
  return config
