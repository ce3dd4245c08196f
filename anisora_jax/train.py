"""Trains a video transformer, or goes on with the run that --workdir holds.

  python -m anisora_jax.train --config configs/tiny.py --config.data.records=out/records --workdir out/run

Every field of the config is a flag, for example --config.optimizer.rate=3e-4; configs/base.py explains them all.
A run that was stopped by SIGTERM, Ctrl-C, kill -9 or a power cut goes on with the same command, as if it had not been.
"""

import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.experiment import train

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, measures.jsonl, TensorBoard files.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print mesh, parameters, memory and FLOPs of a step, and stop.")


def main() -> None:
  """Reads the flags and calls the assembly."""
  if DRY_RUN.value:
    train.dry_run(entry.config())
  else:
    train.train(entry.config(), Path(entry.needed("workdir", "out/run")))


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
