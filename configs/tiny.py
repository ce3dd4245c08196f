"""A tiny transformer for the embedded films: shows that everything works, learns a little.

Command: make quickstart (which adds the mesh of 8 simulated devices and the folder of records).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.size = "tiny"
  config.codec.scale = 4.0
  config.times.shift = 4.0
  config.sample.shift = 4.0
  config.data.buckets = "9x24x36@8"
  config.train.steps = 120
  config.train.held_out = 30
  config.train.checkpoint = 30
  config.optimizer.rate = 3e-3
  config.optimizer.warmup = 20
  config.optimizer.ema = 0.98
  config.sample.steps = 8
  return config
