"""Time of attention on this machine's cores: blockwise and dense against torch's fused attention, forward and backward.

  python bench/attention.py                                     one clip of 4 heads of width 64, at three lengths
  python bench/attention.py --lengths 8192 --heads 2 --width 128

All three get the same f32 numbers and cores and take turns, so that other work on the machine disturbs them alike;
results are compared before any timing. torch runs scaled_dot_product_attention, heads before tokens, as it likes them.
Ratios are blockwise's median over the other's: below 1 blockwise is faster; the fastest turns are the least disturbed.
On a busy machine take --cores 1: torch's threads wait for one another.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from anisora_jax import entry
from anisora_jax.models.kernels import LOCAL

FLAGS = flags.FLAGS
flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "Tokens of a clip.")
flags.DEFINE_integer("heads", 4, "Heads.", lower_bound=1)
flags.DEFINE_integer("width", 64, "Numbers of a head.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Turns.", lower_bound=1)
flags.DEFINE_integer("cores", None, "Use so many cores; by default all.", lower_bound=1)

Works = dict[str, Callable[[], list]]  # "forward" and "both" -> output, and gradients of q, k, v


def ours(kernel: str, parts: list[np.ndarray]) -> Works:
  attend = LOCAL[kernel].attend

  def both(q, k, v, do):
    o, back = jax.vjp(partial(attend, ids=None), q, k, v)
    return [o, *back(do)]

  placed = [jnp.asarray(x) for x in parts]
  forward, both = jax.jit(lambda q, k, v, do: [attend(q, k, v, None)]), jax.jit(both)
  return {"forward": lambda: jax.block_until_ready(forward(*placed)),
          "both": lambda: jax.block_until_ready(both(*placed))}


def torchs(parts: list[np.ndarray]) -> Works:
  *given, do = (torch.tensor(x).transpose(1, 2).contiguous() for x in parts)
  given = [x.requires_grad_() for x in given]
  attend = torch.nn.functional.scaled_dot_product_attention

  def forward():
    with torch.no_grad():
      return [attend(*given)]

  def both():
    o = attend(*given)
    return [o, *torch.autograd.grad(o, given, do)]

  return {"forward": forward, "both": both}


def check(works: dict[str, Works]) -> None:
  """Stops if two of them do not compute the same."""
  true = [x.detach().transpose(1, 2).numpy() for x in works["torch"]["both"]()]
  for name in ("blockwise", "dense"):
    apart = max(abs(a - b).max() / abs(b).max() for a, b in zip(works[name]["both"](), true, strict=True))
    if apart > 1e-4:
      raise RuntimeError(f"{name} differs from torch by {apart:.1e} and must not be compared.")


def seconds(work: Callable[[], object]) -> float:
  time.sleep(0.05)  # meanwhile threads of the other side that still wait for work go to sleep
  work()
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def lines(length: int) -> list[str]:
  """What to print for one length."""
  draw = np.random.default_rng(0)
  parts = [draw.standard_normal((1, length, FLAGS.heads, FLAGS.width), dtype=np.float32) for _ in range(4)]
  works = {"blockwise": ours("blockwise", parts), "dense": ours("dense", parts), "torch": torchs(parts)}
  check(works)
  taken = {(what, name): [] for name in works for what in works[name]}
  for _ in range(FLAGS.rounds):
    for what, name in taken:
      taken[what, name].append(seconds(works[name][what]))
  made, cores = [], len(os.sched_getaffinity(0))
  for what, words in (("forward", "forward"), ("both", "forward and backward")):
    middle = {name: median(taken[what, name]) for name in works}
    best = {name: min(taken[what, name]) for name in works}
    ratios = ", ".join(f"/ {name} {middle['blockwise'] / middle[name]:.2f} (fastest turns "
                       f"{best['blockwise'] / best[name]:.2f})" for name in ("dense", "torch"))
    made.append(f"attention  {length} tokens, {FLAGS.heads} heads of {FLAGS.width}, {words}, cores {cores}: "
                f"blockwise {middle['blockwise'] * 1e3:.1f} ms, {ratios} (goal <= 1.00)")
  return made


def main() -> None:
  if FLAGS.cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-FLAGS.cores:])  # before XLA counts them
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  for length in FLAGS.lengths:
    print(*lines(int(length)), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
