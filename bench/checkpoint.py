"""How long a checkpoint holds training up, as a share of a step and of the steps between two checkpoints.

  python bench/checkpoint.py --steps 12

Trains the tiny config on random pixels, saving in the background every `--every` steps; the first save, which makes
folders and threads, is not counted.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anisora_jax import entry
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.experiment import parts, train
from anisora_jax.training import optimizer
from configs import tiny

STEPS = flags.DEFINE_integer("steps", 24, "Steps to time.", lower_bound=8)
EVERY = flags.DEFINE_integer("every", 4, "Steps between checkpoints.", lower_bound=1)


def main() -> None:
  """Times steps and saves, and prints one line."""
  config = tiny.get_config()
  made = parts.assemble(config, count=1)
  chain, _ = optimizer.build(made.optimizer, parts.abstract_params(made))
  abstract, make = train.training_state(made, chain)
  frozen, captions = train.frozen_parts(made, config)
  state, step = make(None), train.compiled_step(made, chain, abstract)
  bucket, rng = made.buckets[0], np.random.default_rng(0)
  shape = (bucket.batch, bucket.frames, bucket.height, bucket.width)
  batch = parts.to_devices(made, captions, {
    "frames": rng.integers(0, 255, (*shape, 3), np.uint8), "caption": [""] * bucket.batch,
    "character": np.zeros(shape, bool), "ok": np.ones(bucket.batch, np.float32)})
  seconds, stalls = [], []
  with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, say=print) as checkpoints:
    for number in range(1, STEPS.value + 1):
      began = time.perf_counter()
      state, measures = step(state, batch, frozen)
      jax.block_until_ready(measures)
      seconds.append(time.perf_counter() - began)
      if number % EVERY.value == 0:
        stalls.append(checkpoints.save(number, state, {}, {}))
    checkpoints.wait()
  stall, whole = median(stalls[1:]), median(seconds[1:])
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
  print(f"checkpoint of {size:.1f} MiB: holds training up for {stall * 1e3:.1f} ms = {stall / whole:.2f} steps of "
        f"{whole * 1e3:.0f} ms; saved every 200 steps that is {stall / whole / 200:.3%} of the time")


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
