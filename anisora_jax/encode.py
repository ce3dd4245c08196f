"""Turns clips into latents, with text and image tokens, so that training holds none of the encoders.

  python -m anisora_jax.encode --config configs/wan21_i2v_14b.py --config.pretrained=Wan2.1-I2V-14B-480P \\
    --config.data.records=out/records --out out/latents

and then train with the same config and --config.data.records=out/latents. Each clip is seen under --config.data.views
masks, drawn from the config's tasks. Every host encodes its share on its own devices. A run that was stopped goes on
with the same command; a folder belongs to one codec, encoder, size and preprocessing, and says so of any other.
"""

import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.experiment import encode

OUT = flags.DEFINE_string("out", None, "Folder for the latents.")
BATCH = flags.DEFINE_integer("batch", 0, "Clips at a time on each host; 0 for one a device.", lower_bound=0)


def main() -> None:
  """Reads the flags and calls the assembly."""
  encode.encode(entry.config(), Path(entry.needed("out", "out/latents")), BATCH.value)


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
