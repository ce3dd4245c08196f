"""Speed of one NVIDIA GPU at the sizes of Wan 14B: attention, one layer, and what a time for each frame costs.

  python bench/card.py                                                               where the card is
  python bench/card.py --try --lengths 256 --heads 2 --head_width 16 --exact 64      anywhere: that it runs

Attention, forward and backward, counts 4 l^2 d FLOPs forward and 2.5 times that backward, where logits are made again;
it is held against the rate of one large matrix product, measured in the same run, and where torch sees the card against
its scaled_dot_product_attention. All in bf16. A ring of 8 is worked on one card, turn by turn, its hops copies: what
blocks cost, and by how much their sum differs from dense attention in f32. (The blocks of a turn are one call, which
fills the card better than the single block of a device of a ring.) The layer is that of Wan 14B between the
network's ends.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import step
from absl import flags
from einops import rearrange

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.models.kernels import LOCAL
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import SIZES
from anisora_jax.parallel import mesh
from anisora_jax.parallel.ring import Route, ring

FLAGS = flags.FLAGS
flags.DEFINE_list("lengths", ["32760", "75600"], "Tokens of a clip: 81x480x832 and 81x720x1280.")
flags.DEFINE_list("heads", ["12", "40"], "Heads, as in 1.3B and 14B.")
flags.DEFINE_integer("head_width", 128, "Numbers of a head.", lower_bound=1)
flags.DEFINE_bool("try", False, "Without a card: blockwise attention, the tiny network.")
flags.DEFINE_list("exact", ["8192", "8184"], "Tokens at which a ring is held against dense attention: multiples of 8, "
                  "of which cuDNN takes blocks of odd lengths, as of 8184, another way.")
RING = 8
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


Both = Callable[..., list[jax.Array]]  # (q, k, v, do) -> o and the gradients of q, k and v


def both(attend: Callable) -> Both:
  """Of attention, (q, k, v) -> o."""
  def work(q, k, v, do):
    o, back = jax.vjp(attend, q, k, v)
    return [o, *back(do)]

  return work


def in_turns(kernel: str) -> Both:
  """Attention as a ring works it, all its devices at once on one."""
  turns = jax.vmap(both(lambda q, k, v: ring(q, k, v, None, Route(("seq",)), LOCAL[kernel].block)), axis_name="seq")

  def work(*parts):
    made = turns(*(rearrange(x, "b (r l) a k -> r b l a k", r=RING) for x in parts))
    return [rearrange(x, "r b l a k -> b (r l) a k") for x in made]

  return work


def in_f32(q, k, v, do):
  return both(LOCAL["dense"].attend)(*(x.astype(jnp.float32) for x in (q, k, v, do)))


def call(work: Both, parts: list[np.ndarray]) -> Callable[[], list[jax.Array]]:
  placed, run = [jnp.asarray(x, jnp.bfloat16) for x in parts], jax.jit(work)
  return lambda: jax.block_until_ready(run(*placed))


def apart(kernel: str, length: int, heads: int) -> tuple[float, float]:
  """How far a ring is from dense attention in f32 on the same numbers, relative: output, and the worst gradient."""
  parts = arrays(length, heads, FLAGS.head_width)
  with jax.default_matmul_precision("highest"):
    true = call(in_f32, parts)()
  found = [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
           for a, b in zip(call(in_turns(kernel), parts)(), true, strict=True)]
  return found[0], max(found[1:])


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


def attention(length: int, heads: int, kernel: str, peak: float) -> Iterator[str]:
  parts = arrays(length, heads, FLAGS.head_width)
  flops = 3.5 * 4 * length**2 * heads * FLAGS.head_width
  took, their = timed(call(both(LOCAL[kernel].attend), parts), FLAGS.rounds), torchs(parts)
  line = (f"attention  {length} tokens, {heads} heads of {FLAGS.head_width}, {kernel}: {took * 1e3:.1f} ms, "
          f"{flops / took / 1e12:.0f} TFLOP/s, {flops / took / peak:.2f} of a matrix product's {peak / 1e12:.0f}")
  yield line + (f"; torch / ours {timed(their, FLAGS.rounds) / took:.2f} (goal >= 1.00)" if their else "")
  turns = timed(call(in_turns(kernel), parts), FLAGS.rounds)
  yield (f"ring       {length} tokens in {RING} blocks, {heads} heads, {kernel}: {turns / took:.2f} of one call (goal "
         "<= 1.10)")


def exact(length: int, heads: int, kernel: str) -> str:
  o, grads = apart(kernel, length, heads)
  return (f"exact      {length} tokens in {RING} blocks, {heads} heads, {kernel}: from dense in f32 o {o:.1e} (goal <= "
          f"3e-3), gradients {grads:.1e} (<= 1e-2)")


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
  for length in (*FLAGS.lengths, *FLAGS.exact):
    if int(length) % RING:
      raise BadInput(f"{length} tokens are no {RING} equal blocks: choose multiples of {RING}.")
  for length in FLAGS.lengths:
    for heads in FLAGS.heads:
      for line in attention(int(length), int(heads), kernel, peak):
        print(line, flush=True)
  for length in FLAGS.exact:
    for heads in FLAGS.heads:
      print(exact(int(length), int(heads), kernel), flush=True)
  for length in FLAGS.lengths:
    print(*layer(CLIPS.get(length, (3, 8, 12)), name, kernel), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
