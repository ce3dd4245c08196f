"""Time of a training gradient: ours against diffusers on this machine's cores, or ours alone on a GPU.

  python bench/step.py                                                            tiny, against diffusers, on the CPU
  python bench/step.py --size wan21_t2v_1p3b --frames 49 --height 480 --width 832    one GPU, random inputs

One step is forward and backward of the mean squared velocity error, without an optimizer.
On the CPU both networks have the same weights (through models/wan/names.py), inputs, precision (f32) and cores, and
take turns, so that other work on the machine disturbs them alike. Loss and gradients are compared before any timing.
Ratios are our median over theirs: below 1 we are faster; the fastest steps are the least disturbed. diffusers runs as
it comes, and in one case also by torch.compile, which says what compiling costs each side. On a busy machine take
--cores 1: torch's threads wait for one another.
On a GPU arithmetic is bf16 and attention cuDNN's. MFU counts the FLOPs of the model: nothing that is computed twice.
"""

import os
import sys
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.models import codec, names
from anisora_jax.models.pixels import Pixels
from anisora_jax.models.remat import REMAT
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.names import entries
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh
from anisora_jax.training import report

FLAGS = flags.FLAGS
flags.DEFINE_enum("size", "tiny", list(SIZES), "Which transformer.")
flags.DEFINE_integer("batch", None, "Clips of a step; by default 4, on a GPU 1.", lower_bound=1)
flags.DEFINE_integer("frames", 9, "Pixel frames of a clip.", lower_bound=1)
flags.DEFINE_integer("height", 24, "Pixel rows.", lower_bound=1)
flags.DEFINE_integer("width", 36, "Pixel columns.", lower_bound=1)
flags.DEFINE_integer("rounds", 5, "Turns of four timed steps; on a GPU steps.", lower_bound=1)
flags.DEFINE_enum("remat", "attention", list(REMAT), "What our backward pass keeps.")
flags.DEFINE_integer("cores", None, "Use so many cores; by default all.", lower_bound=1)
flags.DEFINE_bool("torch_compile", True, "Whether to run torch.compile too, which needs a C++ compiler.")


def latents(size: Size, frames: int, height: int, width: int) -> tuple[int, int, int]:
  """(f, h, w) of a clip in the Wan codecs (strides 4 and 8; 5B: 16), for small sizes in the pixel codec."""
  published = size.text_width == 4096
  spatial = {16: 8, 48: 16}[size.channels] if published else round((size.channels / 3) ** 0.5)
  cells = Pixels(spatial * size.patch, 4 if published else 1)  # only its strides are used
  f, h, w = codec.latent_shape(cells, frames, height, width)
  return f, h * size.patch, w * size.patch


def inputs(size: Size, batch: int, clip: tuple[int, int, int], times: int) -> dict[str, np.ndarray]:
  """Random inputs and a target. times: 1, or one for each latent frame."""
  draw = np.random.default_rng(0)

  def normal(*shape: int) -> np.ndarray:
    return draw.standard_normal((batch, *shape), dtype=np.float32)

  made = {"x": normal(*clip, size.channels), "t": draw.uniform(size=(batch, times)).astype(np.float32),
          "text": normal(size.text_tokens, size.text_width), "target": normal(*clip, size.channels)}
  made |= {"given": normal(*clip, size.given)} if size.given else {}
  return made | ({"image": normal(257, size.image_width)} if size.image_width else {})


def gradient(net: WanDiT) -> Callable:
  """(params, inputs) -> (loss, gradients), jitted."""
  def loss(params: dict, given: dict):
    velocity = net.apply({"params": params}, **{name: x for name, x in given.items() if name != "target"})
    return jnp.square(velocity - given["target"]).mean()

  return jax.jit(jax.value_and_grad(loss))


def initial(net: WanDiT, given: dict) -> dict:
  """Random parameters; the head's kernel too, which starts at zero and would let no gradient through."""
  def make(key, given):
    params = net.init(key, **{name: x for name, x in given.items() if name != "target"})["params"]
    params["head"]["out"]["kernel"] = 0.02 * jax.random.normal(key, params["head"]["out"]["kernel"].shape)
    return params

  return jax.jit(make)(jax.random.key(0), given)


def seconds(work: Callable[[], object], steps: int = 4) -> list[float]:
  """Times steps in a row, as training runs them, after one that is not counted."""
  time.sleep(0.3)  # meanwhile threads of the other side that still wait for work go to sleep
  ends = []
  for _ in range(steps + 1):
    work()
    ends.append(time.perf_counter())
  return np.diff(ends).tolist()


def check(ours: tuple, loss: float, theirs: dict, size: Size) -> None:
  """Stops if the two sides do not compute the same."""
  true = names.from_torch(theirs, entries(size, "diffusers"))
  apart = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), ours[1], true)
  worst = max(abs(float(ours[0]) / loss - 1), *jax.tree.leaves(apart))
  if worst > 1e-3:
    raise RuntimeError(f"the two networks differ by {worst:.1e} and must not be compared.")


def against_diffusers(size: Size, batch: int, clip: tuple[int, int, int], times: int, compiled: bool) -> list[str]:
  """The lines to print for one case on the CPU. compiled: also against torch.compile."""
  import witness  # here, so that a machine with a GPU needs no torch

  cores = len(os.sched_getaffinity(0))
  witness.use_cores(cores)
  net, given = WanDiT(size, mesh.build(), remat=FLAGS.remat), inputs(size, batch, clip, times)
  params = initial(net, given)
  start = time.perf_counter()
  step = gradient(net).lower(params, given).compile()
  ready = time.perf_counter() - start
  placed = jax.device_put(given)
  model = witness.model(size, names.to_torch(params, entries(size, "diffusers")))
  works = {"ours": lambda: jax.block_until_ready(step(params, placed)),
           "diffusers": witness.gradient(model, size, given, compiled=False)}
  loss = works["diffusers"]()
  check(step(params, placed), loss, witness.gradients(model), size)
  if compiled:
    works["torch.compile"] = witness.gradient(model, size, given, compiled=True)
    start = time.perf_counter()
    works["torch.compile"]()
    first = time.perf_counter() - start
  for work in works.values():
    work()
  taken = {name: [] for name in works}
  for _ in range(FLAGS.rounds):
    for name, work in works.items():
      taken[name] += seconds(work)
  middle = {name: median(each) for name, each in taken.items()}
  case = f"{'a time for each frame' if times > 1 else 'one time for a clip'}, {batch} clips, cores {cores}"
  lines = [f"step     {case}: ours {middle['ours']:.3f} s, {name} {theirs:.3f} s: ratio {middle['ours'] / theirs:.2f}"
           f", of the fastest steps {min(taken['ours']) / min(taken[name]):.2f} (goal <= 1.00)"
           for name, theirs in middle.items() if name != "ours"]
  if compiled:
    building = first - middle["torch.compile"]
    lines.append(f"compile  {case}: ours {ready:.1f} s, torch.compile {building:.1f} s: ratio {ready / building:.2f} "
                 "(goal <= 1.00)")
  return lines


def on_gpu(size: Size, batch: int, clip: tuple[int, int, int]) -> str:
  """The line to print for one GPU."""
  on = mesh.build()
  net = WanDiT(size, on, kernel="cudnn", remat=FLAGS.remat, dtype=jnp.bfloat16)
  given = jax.device_put(inputs(size, batch, clip, clip[0]))
  params = initial(net, given)
  start = time.perf_counter()
  step = gradient(net).lower(params, given).compile()
  ready = time.perf_counter() - start
  took = median(seconds(lambda: jax.block_until_ready(step(params, given)), FLAGS.rounds))
  n = clip[1] * clip[2] // size.patch**2
  flops = 3 * batch * size.forward_flops(clip[0], n, 257 if size.image_width else 0)
  peak = report.peak(mesh.device_kind(on))
  share = f"MFU {flops / took / peak:.3f}" if peak else "MFU unknown: this device's peak is not in training/report.py"
  return (f"step     {FLAGS.size}, {batch} x {FLAGS.frames}x{FLAGS.height}x{FLAGS.width}, {clip[0] * n} tokens a clip, "
          f"bf16, cudnn, remat {net.remat}, one {mesh.device_kind(on)}: {took:.3f} s, "
          f"{batch * clip[0] * n / took:.0f} tokens/s, {flops / took / 1e12:.0f} TFLOP/s, {share}; "
          f"compiled in {ready:.1f} s")


def main() -> None:
  if FLAGS.cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-FLAGS.cores:])  # before XLA counts them
  size, gpu = SIZES[FLAGS.size], jax.default_backend() == "gpu"
  clip = latents(size, FLAGS.frames, FLAGS.height, FLAGS.width)
  if gpu:
    print(on_gpu(size, FLAGS.batch or 1, clip))
  elif size.parameters() > 1e8:
    raise BadInput(f"--size {FLAGS.size} needs a GPU and here is none: run it where one is, or take --size tiny.")
  else:
    for times in (1, clip[0]):
      compiled = FLAGS.torch_compile and times == 1
      print(*against_diffusers(size, FLAGS.batch or 4, clip, times, compiled), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
