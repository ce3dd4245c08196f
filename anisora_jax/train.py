"""Trains a video transformer, or goes on with the run that --workdir holds.

  python -m anisora_jax.train --config configs/tiny.py --config.data.records=out/records --workdir out/run

Every field of the config is a flag, for example --config.optimizer.rate=3e-4; configs/base.py explains them all.
A run that was stopped by SIGTERM, Ctrl-C, kill -9 or a power cut goes on with the same command, as if it had not been.
"""

import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.experiment import train

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, measures.jsonl, TensorBoard files.")
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print mesh, parameters, memory, FLOPs and collectives of a step, and stop.")
TARGET = flags.DEFINE_string(
  "target", "", "Of a dry run: devices that are not here, as h200:8, v5p:2x2x4 or v6e:4x4, to compile for.")
ESTIMATE = flags.DEFINE_bool("estimate", False, "Dry run without compiling: memory by formulas, at once.")
STOPPED_STATUS = flags.DEFINE_integer(
  "stopped_status", 0, "Exit status of a run that a signal stopped, for schedulers that start again what did not end.",
  lower_bound=0, upper_bound=125)

SMALLER = ("take fewer clips in data.buckets, more train.micro_batches, a model.remat that keeps less, or "
           "optimizer.offload; --dry_run says what a step takes")


def main() -> None:
  """Reads the flags and calls the assembly."""
  if TARGET.value and not (DRY_RUN.value or ESTIMATE.value):
    raise BadInput(f"--target {TARGET.value} names devices that are not here: add --dry_run, or leave it out.")
  if DRY_RUN.value or ESTIMATE.value:
    train.dry_run(entry.config(), target=TARGET.value, compiled=not ESTIMATE.value)
  elif train.train(entry.config(), Path(entry.needed("workdir", "out/run"))):
    sys.exit(STOPPED_STATUS.value)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__, smaller=SMALLER)
