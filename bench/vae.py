"""Time to encode and to decode a clip: ours against diffusers on this machine's cores, or ours alone on a GPU.

  python bench/vae.py                                                     Wan 2.1, against diffusers, on the CPU
  python bench/vae.py --frames 81 --height 480 --width 832                one GPU, random weights and pixels

On the CPU both codecs have the same weights (through models/wan/vae_names.py), clips, precision (f32) and cores, and
take turns, so that other work on the machine disturbs them alike; what they make is compared before any timing.
diffusers works latent frame by latent frame, ours so and as a whole. Ratios are our median over theirs: below 1 we are
faster; the fastest turns are the least disturbed. On a busy machine take --cores 1: torch's threads wait for one
another. On a GPU arithmetic is bf16; memory is what the compiled program takes beside its clip, latents and weights.
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
from flax.traverse_util import unflatten_dict

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.models import names
from anisora_jax.models.wan import vae_names
from anisora_jax.models.wan.vae import WanVAE
from anisora_jax.models.wan.vae_sizes import VAE_SIZES, VAESize
from anisora_jax.parallel import mesh

FLAGS = flags.FLAGS
flags.DEFINE_enum("codec", "wan21", list(VAE_SIZES), "Which codec.")
flags.DEFINE_integer("frames", 5, "Pixel frames of the clip.", lower_bound=1)
flags.DEFINE_integer("height", 64, "Pixel rows.", lower_bound=1)
flags.DEFINE_integer("width", 64, "Pixel columns.", lower_bound=1)
flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_integer("tile", 256, "On a GPU, pixels a side of the tiles of the tiled form; they overlap by a quarter.")
flags.DEFINE_integer("cores", None, "Use so many cores; by default all.", lower_bound=1)

MOST = 12 * 256 * 256  # pixels of a clip that a CPU is asked for: minutes

encode = jax.jit(lambda codec, x: codec.encode(x))
decode = jax.jit(lambda codec, x: codec.decode(x))


def seconds(work: Callable[[], object]) -> float:
  time.sleep(0.3)  # meanwhile threads of the other side that still wait for work go to sleep
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def apart(ours: jax.Array, theirs: np.ndarray) -> float:
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def against_diffusers(codec: WanVAE, frames: jax.Array) -> list[str]:
  """The lines to print for a CPU."""
  import vae_witness  # here, so that a machine with a GPU needs no torch

  cores = len(os.sched_getaffinity(0))
  vae_witness.use_cores(cores)
  tensors = names.to_torch(codec.params, vae_names.entries(codec.size, "diffusers"))
  model, chunks = vae_witness.model(codec.size, tensors), codec.replace(chunked=True)
  latents, lines = encode(codec, frames), []
  for verb, work, other, given in [("encode", encode, vae_witness.encode, frames),
                                   ("decode", decode, vae_witness.decode, latents)]:
    sides = {"whole": lambda w=work, x=given: jax.block_until_ready(w(codec, x)),
             "in chunks": lambda w=work, x=given: jax.block_until_ready(w(chunks, x)),
             "diffusers": other(model, codec.size, np.asarray(given))}
    made = {name: side() for name, side in sides.items()}
    worst = max(apart(made[name], made["diffusers"]) for name in ("whole", "in chunks"))
    if worst > 1e-3:
      raise RuntimeError(f"the two codecs differ by {worst:.1e} and must not be compared.")
    taken = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
      for name, side in sides.items():
        taken[name].append(seconds(side))
    theirs = taken.pop("diffusers")
    case = f"{FLAGS.codec}, {'x'.join(map(str, frames.shape[1:4]))}, cores {cores}"
    lines += [f"{verb}   {case}, {name}: ours {median(each):.3f} s, diffusers {median(theirs):.3f} s: ratio "
              f"{median(each) / median(theirs):.2f}, of the fastest turns {min(each) / min(theirs):.2f} (goal <= 1.00)"
              for name, each in taken.items()]
  return lines


def timed(work: Callable, codec: WanVAE, given: jax.Array) -> str:
  """Seconds and memory of one form on a GPU, or that it does not fit."""
  start = time.perf_counter()
  ready = work.lower(codec, given).compile()
  building, need = time.perf_counter() - start, ready.memory_analysis().temp_size_in_bytes / 2**30
  try:
    jax.block_until_ready(ready(codec, given))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return f"does not fit, with {need:.1f} GiB at work"
  took = [seconds(lambda: jax.block_until_ready(ready(codec, given))) for _ in range(FLAGS.rounds)]
  return f"{median(took):.3f} s, {need:.1f} GiB at work; compiled in {building:.1f} s"


def on_gpu(codec: WanVAE, frames: jax.Array) -> list[str]:
  """The lines to print for one GPU: the clip as a whole, in chunks, and in chunks in tiles."""
  whole, tile = codec.replace(dtype=jnp.bfloat16), FLAGS.tile
  forms = {"whole": whole, "in chunks": whole.replace(chunked=True),
           f"in chunks and tiles of {tile}": whole.replace(chunked=True, tile=tile, overlap=tile // 4)}
  case = f"{FLAGS.codec}, {'x'.join(map(str, frames.shape[1:4]))}, bf16, one {mesh.device_kind(mesh.build())}"
  latents = encode(forms["in chunks"], frames)
  return [f"{verb}   {case}, {name}: {timed(work, form, given)}"
          for verb, work, given in [("encode", encode, frames), ("decode", decode, latents)]
          for name, form in forms.items()]


def random_codec(size: VAESize) -> WanVAE:
  """Random weights, such that numbers neither grow nor vanish through the layers."""
  draw, paths = np.random.default_rng(0), names.shapes(vae_names.entries(size, "native"))
  flat = {path: draw.standard_normal(shape, np.float32) * np.prod(shape[:-1]) ** -0.5 if path.endswith("kernel")
          else np.full(shape, path.endswith("scale"), np.float32) for path, shape in paths.items()}
  return WanVAE(jax.device_put(unflatten_dict(flat, sep="/")), size)


def main() -> None:
  if FLAGS.cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-FLAGS.cores:])  # before XLA counts them
  clip, gpu = (FLAGS.frames, FLAGS.height, FLAGS.width), jax.default_backend() == "gpu"
  if np.prod(clip) > MOST and not gpu:
    raise BadInput(f"a clip of {'x'.join(map(str, clip))} needs a GPU and here is none: run it where one is, or take "
                   "for example --frames 5 --height 64 --width 64.")
  codec = random_codec(VAE_SIZES[FLAGS.codec])
  frames = jax.random.uniform(jax.random.key(1), (1, *clip, 3), minval=-1, maxval=1)
  print(*(on_gpu if gpu else against_diffusers)(codec, frames), sep="\n", flush=True)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
