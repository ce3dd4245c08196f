"""Time of attention on this machine's cores: blockwise and dense against torch's fused attention, forward and backward.

  python bench/attention.py                                     one clip of 4 heads of width 64, at three lengths
  python bench/attention.py --lengths 8192 --heads 2 --width 128
  python bench/attention.py --ring                              a ring of 8 simulated devices against one device

All three get the same f32 numbers and cores and take turns, so that other work on the machine disturbs them alike;
results are compared before any timing. torch runs scaled_dot_product_attention, heads before tokens, as it likes them.
Ratios are blockwise's median over the other's: below 1 blockwise is faster; the fastest turns are the least disturbed.
On a busy machine take --cores 1: torch's threads wait for one another.
The devices of a ring share the cores of one machine, so that its time over that of dense attention on one device says
what splitting costs a token in all: smaller products, partial results to join, hops.
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
from anisora_jax.models.attention import PATTERNS
from anisora_jax.models.kernels import LOCAL
from anisora_jax.parallel import mesh as meshes

FLAGS = flags.FLAGS
flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "Tokens of a clip.")
flags.DEFINE_integer("heads", 4, "Heads.", lower_bound=1)
flags.DEFINE_integer("width", 64, "Numbers of a head.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Turns.", lower_bound=1)
flags.DEFINE_integer("cores", None, "Use so many cores; by default all.", lower_bound=1)
flags.DEFINE_bool("ring", False, "A ring of 8 simulated devices, against one.")

Works = dict[str, Callable[[], list]]  # "forward" and "both" -> output, and gradients of q, k, v


def ours(kernel: str, parts: list[np.ndarray]) -> Works:
  return compiled(partial(LOCAL[kernel].attend, ids=None), [jnp.asarray(x) for x in parts])


def compiled(attend: Callable, placed: list[jax.Array]) -> Works:
  """attend: (q, k, v) -> o; placed: q, k, v and the output's gradient."""
  def both(q, k, v, do):
    o, back = jax.vjp(attend, q, k, v)
    return [o, *back(do)]

  forward, both = jax.jit(lambda q, k, v, do: [attend(q, k, v)]), jax.jit(both)
  return {"forward": lambda: jax.block_until_ready(forward(*placed)),
          "both": lambda: jax.block_until_ready(both(*placed))}


def split(pattern: str, kernel: str, parts: list[np.ndarray]) -> Works:
  """Over all devices, whose tokens are those of one frame."""
  mesh = meshes.build({"seq": jax.device_count()})
  frame = jax.sharding.NamedSharding(mesh, jax.P(None, None, "seq"))
  attend = partial(PATTERNS[pattern], segments=None, mesh=mesh, kernel=kernel)
  return compiled(attend, [jax.device_put(x[:, None], frame) for x in parts])


def torchs(parts: list[np.ndarray]) -> Works:
  *given, do = (torch.tensor(x).transpose(1, 2).contiguous() for x in parts)
  given = [x.requires_grad_() for x in given]
  attend = torch.nn.functional.scaled_dot_product_attention

  def tokens(arrays):
    return [x.detach().transpose(1, 2) for x in arrays]

  def forward():
    with torch.no_grad():
      return tokens([attend(*given)])

  def both():
    o = attend(*given)
    return tokens([o, *torch.autograd.grad(o, given, do)])

  return {"forward": forward, "both": both}


def check(works: dict[str, Works]) -> None:
  """Stops if two of them do not compute the same."""
  (first, true), *others = ((name, [np.asarray(x).reshape(-1) for x in arrays["both"]()])
                            for name, arrays in works.items())
  for name, found in others:
    apart = max(abs(a - b).max() / abs(b).max() for a, b in zip(found, true, strict=True))
    if apart > 1e-4:
      raise RuntimeError(f"{name} differs from {first} by {apart:.1e} and must not be compared.")


def seconds(work: Callable[[], object]) -> float:
  time.sleep(0.05)  # meanwhile threads of the other side that still wait for work go to sleep
  work()
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def timed(works: dict[str, Works]) -> dict[tuple[str, str], list[float]]:
  """(what, name) -> seconds of each turn."""
  check(works)
  taken = {(what, name): [] for name in works for what in works[name]}
  for _ in range(FLAGS.rounds):
    for what, name in taken:
      taken[what, name].append(seconds(works[name][what]))
  return taken


def lines(length: int) -> list[str]:
  """What to print for one length: of the first against each of the others."""
  draw = np.random.default_rng(0)
  parts = [draw.standard_normal((1, length, FLAGS.heads, FLAGS.width), dtype=np.float32) for _ in range(4)]
  if FLAGS.ring:
    works = {"ring of 8": split("ring", "blockwise", parts), "dense": ours("dense", parts),
             "blockwise": ours("blockwise", parts)}
  else:
    works = {"blockwise": ours("blockwise", parts), "dense": ours("dense", parts), "torch": torchs(parts)}
  taken, made, cores = timed(works), [], len(os.sched_getaffinity(0))
  first, *others = works
  for what, words in (("forward", "forward"), ("both", "forward and backward")):
    middle = {name: median(taken[what, name]) for name in works}
    best = {name: min(taken[what, name]) for name in works}
    ratios = ", ".join(f"/ {name} {middle[first] / middle[name]:.2f} (fastest turns {best[first] / best[name]:.2f})"
                       for name in others)
    made.append(f"attention  {length} tokens, {FLAGS.heads} heads of {FLAGS.width}, {words}, cores {cores}: "
                f"{first} {middle[first] * 1e3:.1f} ms, {ratios}" + ("" if FLAGS.ring else " (goal <= 1.00)"))
  return made


def main() -> None:
  if FLAGS.cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-FLAGS.cores:])  # before XLA counts them
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if FLAGS.ring:
    meshes.simulate(8)
  for length in FLAGS.lengths:
    print(*lines(int(length)), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
