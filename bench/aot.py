"""What a training step of a 14B network takes of 8 H200 or of a slice of TPUs, compiled here without any of them.

  python -m bench.aot                      every row: minutes each
  python -m bench.aot --rows 'h200.*lora'  those whose name has this
  python -m bench.aot --wheels             what pip has to install for it

FLOPs are the model's, by formula: the backward pass counts twice the forward, nothing counts twice; and those of the
traced step with dense attention, which also counts what it and rematerialisation compute again. What is sent is counted
in the compiled program. A card's memory is without what NCCL and cuDNN take for themselves when they run. Where a step
does not fit, is misjudged by a tenth, sends by other collectives than meant or has a ring stand idle, it is said, and
the exit status is 1.
"""

import importlib
import re
import sys
import time
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from anisora_jax import entry
from anisora_jax.experiment import parts, train
from anisora_jax.parallel import targets, traffic
from anisora_jax.parallel.traffic import Sent
from anisora_jax.planning.arithmetic import products
from anisora_jax.training import optimizer

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


def traced(config: ConfigDict) -> int:
  """FLOPs of the matrix products of a whole step, as its jaxpr has them."""
  config = ConfigDict(config.to_dict())
  config.mesh, config.model.kernel = {}, "dense"
  config.data.buckets = re.sub(r"/\d+$", "", config.data.buckets)
  made = parts.assemble(config, count=1)
  chain, _ = optimizer.build(made.optimizer, parts.abstract_trained(made))
  state, _ = train.training_state(made, chain)
  given = state, train.abstract_batch(made, made.buckets[0]), train.abstract_frozen(made, config)
  return products(train.compiled_step(made, chain, state).trace(*given).jaxpr)


def wrong(row: Row, needed: int, apart: float, sent: dict[str, Sent] | None, hidden: tuple[int, int]) -> list[str]:
  """What of a step is not as it is meant to be."""
  said = [] if targets.verdict(row.target, needed)[:2] != "no" else ["it does not fit"]
  said += [f"the formula is {apart:+.1%} off"] if abs(apart) > 0.1 else []
  if sent is None:
    return said
  shared = "/" in row.bucket  # a clip by several devices
  wanted = {"all-gather"} | ({"all-to-all" if row.attention == "hybrid" else "collective-permute"} if shared else set())
  others = set(sent) - wanted - {"reduce-scatter", "all-reduce"}
  said += [f"no {kind} is sent" for kind in sorted(wanted - set(sent))]
  said += [f"{kind}s are sent" for kind in sorted(others)]
  rings = shared and row.attention != "hybrid"
  return said + (["not every transfer of the ring hides behind a kernel"] if rings and hidden[0] < hidden[1] else [])


def account(row: Row) -> tuple[str, list[str]]:
  """(the line of the table, what is wrong)."""
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
  line = (f"aot      {row.name}: {(kept + worked) / 2**30:.1f} GiB a device ({kept / 2**30:.1f} state and batch; "
          f"{formula / 2**30:.1f} by formula, {apart:+.1%}), {host / 2**30:.1f} of its host's, fits "
          f"{targets.verdict(row.target, kept + worked)}; {flops:.3g} FLOPs, {flops / made.mesh.size:.3g} a device, "
          f"{traced(config):.3g} traced; sends {sends}; compiled in {took:.0f} s")
  return line, wrong(row, kept + worked, apart, sent, hidden)


def main() -> None:
  if FLAGS.wheels:
    print(*targets.wheels("v5p"), *targets.wheels("h200"))
    return
  failed = False
  for row in ROWS:
    if re.search(FLAGS.rows, row.name):
      line, complaints = account(row)
      print(line, *(f"         not as meant: {one}" for one in complaints), sep="\n", flush=True)
      failed = failed or bool(complaints)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
