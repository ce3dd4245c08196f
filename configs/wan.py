"""What recipes on published Wan and AniSora weights share: codec, text encoder, noise times, sampling.

Each of them takes a word after its name: --config configs/wan21_i2v_14b.py:lora tunes adapters beside the weights,
:full, or no word, all of them. --config.pretrained=FOLDER names the download. Clips become latents once,

  python -m anisora_jax.encode --config configs/wan21_i2v_14b.py --config.pretrained=FOLDER \\
    --config.data.records=out/records --out out/latents

and training reads those. Kernel cudnn is for NVIDIA GPUs; take --config.model.kernel=splash on TPUs, or blockwise
anywhere.
"""

from ml_collections import ConfigDict

from anisora_jax.sampling.prompts import NEGATIVE
from configs import base

MODES = ("full", "lora")


def recipe(size: str, mode: str, bucket: str, codec: str = "wan21") -> ConfigDict:
  """A fine-tune of published weights. mode: of MODES; bucket: as data.buckets."""
  if mode not in MODES:
    raise ValueError(f"no mode is named {mode!r}: take one of {', '.join(MODES)}, as in configs/wan21_i2v_14b.py:lora.")
  config = base.get_config()
  config.model.size = size
  config.model.dtype = "bfloat16"
  config.model.kernel = "cudnn"
  config.model.attention = "hybrid"
  config.model.gate = 0.0
  config.codec.name = codec
  config.text.name = "umt5_xxl"
  config.data.encoded = True
  config.data.buckets = bucket
  config.data.fps = 16.0
  config.times.shift = 5.0
  config.times.per_frame = 0.0       # as published: all frames share a time ...
  config.times.late_per_frame = 0.0
  config.times.given = 1.0           # ... given ones too
  config.loss.weight = "bell"
  config.optimizer.rate = 1e-5
  config.optimizer.warmup = 100
  config.optimizer.schedule = "constant"
  config.optimizer.decay = 1e-2
  config.optimizer.ema = 0.999
  config.train.steps = 2000
  config.train.checkpoint = 500
  config.sample.solver = "unipc"
  config.sample.steps = 40
  config.sample.shift = 5.0
  config.sample.start = 0.999
  config.sample.whole = True
  config.sample.multiplier = 1.0
  config.sample.guidance = 5.0
  config.sample.negative = NEGATIVE
  config.sample.area = 480 * 832
  if mode == "lora":
    config.lora.rank = 32
    config.lora.alpha = 32.0
    config.optimizer.rate = 1e-4
    config.optimizer.decay = 0.0
  return config


def only(config: ConfigDict, **tasks: float) -> None:
  """These tasks and no others."""
  for task in config.tasks:
    config.tasks[task] = tasks.get(task, 0.0)
