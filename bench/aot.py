"""What a training step of a 14B network takes of 8 H200 or of a slice of TPUs, compiled here without any of them.

  python -m bench.aot                      every row: minutes each
  python -m bench.aot --rows 'h200.*lora'  those whose name has this
  python -m bench.aot --wheels             what pip has to install for it

FLOPs are the model's: the backward pass counts twice the forward, nothing counts twice. What is sent is counted in the
compiled program. A card's memory is without what NCCL and cuDNN take for themselves when they run.
"""

import importlib
import re
import sys
import time
from typing import NamedTuple

from absl import flags

from anisora_jax import entry
from anisora_jax.experiment import parts, train
from anisora_jax.parallel import targets, traffic

FLAGS = flags.FLAGS
flags.DEFINE_string("rows", "", "Regular expression; only rows in whose name it is found.")
flags.DEFINE_bool("wheels", False, "Print the requirements and stop.")


class Row(NamedTuple):
  """A step to compile. word: of the recipe; bucket: its devices grouped as it says; fsdp: axis of the mesh."""

  target: str
  word: str
  bucket: str
  fsdp: int
  remat: str
  attention: str = "hybrid"
  recipe: str = "wan21_i2v_14b"

  @property
  def name(self) -> str:
    return (f"{self.target} {self.recipe}:{self.word} {self.bucket} fsdp {self.fsdp} remat {self.remat} "
            f"{self.attention}")


ROWS = [
  Row("h200:8", "lora", "81x480x832@8", 8, "attention"),
  Row("h200:8", "full", "81x480x832@8", 8, "attention"),
  Row("h200:8", "lora", "81x720x1280@8", 8, "full"),
  Row("h200:8", "full", "81x720x1280@1/8", 8, "attention"),
  Row("h200:8", "full", "81x720x1280@1/8", 8, "attention", "ring"),
  Row("h200:8", "full", "81x720x1280@1/8", 8, "attention", "ring_both"),
  Row("v5p:4x4x4", "full", "81x480x832@16/4", 64, "attention"),
  Row("v5p:4x4x4", "full", "81x720x1280@16/4", 64, "full", "ring"),
  Row("v6e:8x8", "full", "81x720x1280@8/8", 64, "full", "ring"),
]


def account(row: Row) -> str:
  """The line of the table."""
  config = importlib.import_module(f"configs.{row.recipe}").get_config(row.word)
  config.model.weights = "PATH"  # adapters stand beside weights; nothing is read
  config.model.kernel = "cudnn" if row.target.startswith("h200") else "splash"
  config.model.remat, config.model.attention = row.remat, row.attention
  config.data.buckets, config.mesh.fsdp, config.mesh.seq = row.bucket, row.fsdp, 1
  made = parts.assemble(config, devices=targets.devices(row.target))
  start = time.perf_counter()
  formula = train.estimated(made, config, made.buckets[0]).total
  kept, worked, host, sent, hidden = train.account(made, config, made.buckets[0])
  apart = formula / (kept + worked) - 1
  flops, took = made.work(made.buckets[0])[1], time.perf_counter() - start
  sends = traffic.describe(sent, hidden) if sent else "unknown"
  return (f"aot      {row.name}: {(kept + worked) / 2**30:.1f} GiB a device ({kept / 2**30:.1f} state and batch; "
          f"{formula / 2**30:.1f} by formula, {apart:+.1%}), {host / 2**30:.1f} of its host's, fits "
          f"{targets.verdict(row.target, kept + worked)}; {flops:.3g} FLOPs, {flops / made.mesh.size:.3g} a device; "
          f"sends {sends}; compiled in {took:.0f} s")


def main() -> None:
  if FLAGS.wheels:
    print(*targets.wheels("v5p"), *targets.wheels("h200"))
    return
  for row in ROWS:
    if re.search(FLAGS.rows, row.name):
      print(account(row), flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
