"""A text-to-video network learns a noise time for each frame (Pusa), and with it every task that gives whole frames.

  python -m anisora_jax.encode --config configs/pusa.py --config.pretrained=Wan2.1-T2V-14B \\
    --config.data.records=out/records --out out/latents
  python -m anisora_jax.train --config configs/pusa.py --config.pretrained=Wan2.1-T2V-14B \\
    --config.data.records=out/latents --workdir out/pusa
  python -m anisora_jax.sample --workdir out/pusa --first a.png --prompt "..." --out film
  python -m anisora_jax.sample --workdir out/pusa --clip c.mp4 --keep 13 --prompt "..." --out longer

No parameter is new: equal times still do what the weights did before. Every frame of every clip draws its own time,
which Pusa found best when adapting (p = 1; from scratch 0.2), and one clip in three also shows its first frames clean.
Given frames are sampled with a fifth of the noise of the others, so that they may live a little. It sees whole latent
frames alone, that is frame 0, or 1 + 4k frames of a film.
From: Liu et al. 2025, arXiv:2507.16116: 900 steps of rank 512, guidance 3, 30 steps.

Mesh: fsdp = 8 on 8 H200. Memory of a device, by --dry_run --target h200:8: lora of rank 512 68.6 GiB.
Record: not yet measured.
"""

from ml_collections import ConfigDict

from configs import wan


def get_config(mode: str = "lora") -> ConfigDict:
  config = wan.recipe("wan21_t2v_14b", mode, "81x480x832@8")
  wan.only(config, none=0.65, first=0.2, continuation=0.15)
  config.times.per_frame = config.times.late_per_frame = 1.0
  config.times.given = 0.0
  config.train.steps = 900
  config.sample.solver = "euler"     # a step of each frame by its own time
  config.sample.steps = 30
  config.sample.start, config.sample.whole = 1.0, False
  config.sample.multiplier = 0.2
  config.sample.guidance = 3.0
  if mode == "lora":
    config.lora.rank = 512
    config.lora.alpha = 512.0
  return config
