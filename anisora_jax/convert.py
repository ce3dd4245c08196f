"""Converts weights: published files, or what was trained here, into another format.

  python -m anisora_jax.convert --from Wan2.1-I2V-14B-480P --to out/i2v --format diffusers --dtype bfloat16
  python -m anisora_jax.convert --from out/run --ema --to out/wan --format wan
  python -m anisora_jax.convert --from anisora.safetensors --to out/anisora --format ours
  python -m anisora_jax.convert --from out/tuned --ema --to out/style --format lora_comfyui
  python -m anisora_jax.convert --from out/tuned --ema --to out/whole --format wan
  python -m anisora_jax.convert --from Wan2.2-I2V-A14B --to out/fast --format comfyui --lora high_noise=fast.safetensors

--from takes a .safetensors file, a folder of shards with their index, a folder of Wan, of diffusers or of ComfyUI, with
one transformer or with two experts, a .pth file (torch reads it, running none of its code), a run's --workdir, or what
this program wrote. Which network it is, is seen from its tensors: a transformer, or Wan's codec, text encoder or image
encoder, of which the formats wan and diffusers are written, and of a codec comfyui. Two experts stay two. Of a run that
trained adapters the network is the weights beside which it did, with the adapters added. Weights of eight bits, plain
or with scales, become bfloat16 unless --dtype says else. What is written appears whole, or not at all.
"""

import signal
import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.experiment import convert

FROM = flags.DEFINE_string("from", None, "Weight file, or folder of weights or of a run.")
TO = flags.DEFINE_string("to", None, "New folder for what is written.")
FORMAT = flags.DEFINE_string("format", None, "ours; wan, the native repositories; diffusers; comfyui, one file. For "
                             "adapters of a run: lora_diffusers, lora_peft, lora_comfyui or lora_kohya.")
DTYPE = flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16 for all tensors; by default each keeps its own.")
SHARD = flags.DEFINE_float("shard_gb", 5.0, "Size of a file at most, in 10^9 bytes; comfyui and ours are not split.",
                           lower_bound=1e-6)
EMA = flags.DEFINE_bool("ema", False, "Of a run, the averaged parameters.")
LORA = flags.DEFINE_multi_string("lora", [], "File of adapters to add to the weights, by any naming; high_noise=FILE "
                                 "or low_noise=FILE where there are two experts. May be given again.")
LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "How often the adapters of --lora count.")


def main() -> None:
  """Reads the flags and calls the assembly."""
  path, to = Path(entry.needed("from", "Wan2.1-T2V-1.3B")), Path(entry.needed("to", "out/weights"))
  form = entry.needed("format", "diffusers")
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops it ends it as Ctrl-C does
  try:
    choice = convert.Choice(EMA.value, LORA.value, LORA_SCALE.value)
    convert.convert(path, to, form, DTYPE.value, SHARD.value * 1e9, choice)
  except KeyboardInterrupt:
    print(f"stopped: nothing was written to {to}", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__, many=False)
