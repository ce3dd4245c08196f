"""AniSora V3.2 (weights of Wan 2.2 image-to-video A14B): V3's pictures anywhere in the film, by two experts.

  python -m anisora_jax.encode --config configs/anisora_v32.py --config.pretrained=Index-anisora-V3.2 \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/anisora_v32.py:high_lora --config.pretrained=Index-anisora-V3.2 \\
    --config.data.records=out/latents --workdir out/high
  python -m anisora_jax.sample --config configs/anisora_v32.py --pretrained Index-anisora-V3.2 --prompts lines.txt \\
    --motion 3 --no_text --out out/a

Distilled: 8 steps without guidance, of which the high-noise expert takes three. Tasks are those of
configs/anisora_v3.py; the words, how to join tuned experts, and memory those of configs/wan22_i2v_a14b.py.

Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base, wan22_i2v_a14b


def get_config(mode: str = "high") -> ConfigDict:
  config, start = wan22_i2v_a14b.get_config(mode), base.get_config()
  config.tasks, config.loss.drop_condition = start.tasks, start.loss.drop_condition
  config.sample.steps = 8
  config.sample.guidance = 1.0
  return config
