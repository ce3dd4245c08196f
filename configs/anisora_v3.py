"""AniSora V3 and V3.1 (weights of Wan 2.1 image-to-video 14B): pictures anywhere in the film, regions, continuation.

  python -m anisora_jax.encode --config configs/anisora_v3.py --config.pretrained=Index-anisora-V3 \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/anisora_v3.py:lora --config.pretrained=Index-anisora-V3 \\
    --config.data.records=out/latents --workdir out/style
  python -m anisora_jax.sample --workdir out/style --prompts lines.txt --motion 3 --aesthetic 5.5 --no_text --out out/a
  python -m anisora_jax.sample --config configs/anisora_v3.py --pretrained Index-anisora-V3 --prompts lines.txt

Sampling is its published recipe: 8 UniPC steps without guidance. Clips are seen under all of our tasks, of which
AniSora's are a part: its pictures stand on every eighth frame, our keyframes on every fourth, where latent frames end.

Mesh: fsdp = 8 on 8 H200. Memory of a device: that of configs/wan21_i2v_14b.py, whose network it is.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import wan


def get_config(mode: str = "full") -> ConfigDict:
  config = wan.recipe("wan21_i2v_14b", mode, "81x480x832@8")
  config.sample.steps = 8
  config.sample.guidance = 1.0
  return config
