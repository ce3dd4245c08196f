"""Speed of one NVIDIA GPU at the sizes of Wan 14B: attention, one layer, and what a time for each frame costs.

  python bench/card.py                                                     where the card is
  python bench/card.py --try --lengths 256 --heads 2 --head_width 16       anywhere, small: that it runs, not how fast

Attention, forward and backward, counts 4 l^2 d FLOPs forward and 2.5 times that backward, where logits are made again;
it is held against the rate of one large matrix product, measured in the same run, and where torch sees the card against
its scaled_dot_product_attention. All in bf16. The layer is that of Wan 14B between the network's ends.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import step
from absl import flags

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.models.kernels import LOCAL
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import SIZES
from anisora_jax.parallel import mesh

FLAGS = flags.FLAGS
flags.DEFINE_list("lengths", ["32760", "75600"], "Tokens of a clip: 81x480x832 and 81x720x1280.")
flags.DEFINE_list("heads", ["12", "40"], "Heads, as in 1.3B and 14B.")
flags.DEFINE_integer("head_width", 128, "Numbers of a head.", lower_bound=1)
flags.DEFINE_bool("try", False, "Without a card: blockwise attention, the tiny network.")
CLIPS = {"32760": (21, 60, 104), "75600": (21, 90, 160)}  # tokens -> latents (f, h, w)


def timed(work: Callable[[], object], rounds: int) -> float:
  """Median seconds, after two that are not counted."""
  taken = []
  for _ in range(rounds + 2):
    start = time.perf_counter()
    work()
    taken.append(time.perf_counter() - start)
  return median(taken[2:])


def product(side: int, rounds: int) -> float:
  """FLOP/s of one square matrix product."""
  x = jnp.ones((side, side), jnp.bfloat16)
  run = jax.jit(lambda x: x @ x)
  return 2 * side**3 / timed(lambda: jax.block_until_ready(run(x)), rounds)


def arrays(length: int, heads: int, width: int) -> list[np.ndarray]:
  """q, k, v and the output's gradient."""
  draw = np.random.default_rng(0)
  return [draw.standard_normal((1, length, heads, width), np.float32) for _ in range(4)]


def ours(parts: list[np.ndarray], kernel: str) -> Callable:
  q, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in parts)
  run = jax.jit(lambda q, k, v, do: jax.vjp(lambda *x: LOCAL[kernel].attend(*x, None), q, k, v)[1](do))
  return lambda: jax.block_until_ready(run(q, k, v, do))


def torchs(parts: list[np.ndarray]) -> Callable | None:
  """None where torch is not installed, or sees no card."""
  try:
    import torch
  except ModuleNotFoundError:
    return None
  if not torch.cuda.is_available():
    return None
  *given, do = (torch.tensor(x, dtype=torch.bfloat16, device="cuda").transpose(1, 2).contiguous() for x in parts)
  given = [x.requires_grad_() for x in given]

  def run():
    torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*given), given, do)
    torch.cuda.synchronize()

  return run


def attention(length: int, heads: int, kernel: str, peak: float) -> str:
  parts = arrays(length, heads, FLAGS.head_width)
  flops = 3.5 * 4 * length**2 * heads * FLAGS.head_width
  took, their = timed(ours(parts, kernel), FLAGS.rounds), torchs(parts)
  line = (f"attention  {length} tokens, {heads} heads of {FLAGS.head_width}, {kernel}: {took * 1e3:.1f} ms, "
          f"{flops / took / 1e12:.0f} TFLOP/s, {flops / took / peak:.2f} of a matrix product's {peak / 1e12:.0f}")
  return line + (f"; torch / ours {timed(their, FLAGS.rounds) / took:.2f} (goal >= 1.00)" if their else "")


def layer(clip: tuple[int, int, int], name: str, kernel: str) -> list[str]:
  """Forward and backward of a network of one layer, with one time for a clip and with one for each frame."""
  size, taken = replace(SIZES[name], layers=1), {}
  net = WanDiT(size, mesh.build(), kernel=kernel, remat="attention", dtype=jnp.bfloat16)
  n = clip[1] * clip[2] // size.patch**2
  for times in (1, clip[0]):
    given = jax.device_put(step.inputs(size, 1, clip, times))
    params = step.initial(net, given)
    run = step.gradient(net)
    taken[times] = timed(lambda run=run, params=params, given=given: jax.block_until_ready(run(params, given)),
                         FLAGS.rounds)
  flops = 3 * size.forward_flops(clip[0], n, 257 if size.image_width else 0)
  return [f"layer      {name}, {clip[0] * n} tokens, {kernel}: {taken[1] * 1e3:.1f} ms, "
          f"{flops / taken[1] / 1e12:.0f} TFLOP/s",
          f"times      one for each frame / one for a clip: {taken[clip[0]] / taken[1]:.3f} (goal <= 1.03)"]


def main() -> None:
  card = jax.default_backend() == "gpu"
  if not card and not FLAGS["try"].value:
    raise BadInput("here is no NVIDIA GPU: run it where one is, or add --try.")
  kernel, name = ("cudnn", "wan21_t2v_14b") if card else ("blockwise", "tiny")
  peak = product(8192 if card else 256, FLAGS.rounds)
  for length in FLAGS.lengths:
    for heads in FLAGS.heads:
      print(attention(int(length), int(heads), kernel, peak), flush=True)
  for length in FLAGS.lengths:
    print(*layer(CLIPS.get(length, (3, 8, 12)), name, kernel), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
