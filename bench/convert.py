"""Memory and speed of converting weights, against copying the same files.

  python bench/convert.py

Makes a checkpoint of Wan 2.1 T2V 1.3B in float32 (5.7 GB, arbitrary numbers) and converts it, each time in a process of
its own. Prints that process' largest resident memory beside the bound, 1.3 x the largest shard + 1 GB, and its speed
beside that of shutil.copyfile on the same files just before, each copy brought to disk, as converted files are.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anisora_jax import entry
from anisora_jax.checkpoints import tensor_file
from anisora_jax.experiment import convert
from anisora_jax.models import names
from anisora_jax.models.wan.names import entries
from anisora_jax.models.wan.published import diffusers_config
from anisora_jax.models.wan.sizes import SIZES

SIZE = flags.DEFINE_string("size", "wan21_t2v_1p3b", "Whose names and shapes.")
SHARD = flags.DEFINE_float("shard_gb", 1.0, "Largest file, in 10^9 bytes.")
FOLDER = flags.DEFINE_string("folder", None, "Where to work; by default the system's temporary folder.")
CHILD = """
import json, resource, sys, time
from pathlib import Path
from anisora_jax.experiment.convert import convert
path, to, form, dtype, shard = sys.argv[1:]
began = time.perf_counter()
convert(Path(path), Path(to), form, dtype, float(shard), say=lambda line: None)
print(json.dumps([time.perf_counter() - began, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def synthetic(folder: Path) -> None:
  """A checkpoint in diffusers' form: every tensor a stretch of the same random numbers."""
  folder.mkdir()
  table = names.table(entries(SIZES[SIZE.value], "diffusers"))
  noise = np.random.default_rng(0).normal(size=max(map(np.prod, table.values()))).astype(np.float32)
  places = convert.shards(folder, {name: (np.dtype(np.float32), shape) for name, shape in table.items()},
                          SHARD.value * 1e9)
  for place in places.values():
    tensor_file.fill(place, [memoryview(noise[: np.prod(place.shape)].view(np.uint8))])
  (folder / "config.json").write_text(json.dumps(diffusers_config(SIZES[SIZE.value])))


def copy(files: list[Path], to: Path) -> float:
  """Bytes a second when files are copied and brought to disk."""
  to.mkdir()
  began = time.perf_counter()
  for path in files:
    shutil.copyfile(path, to / path.name)
    with (to / path.name).open("rb") as file:
      os.fsync(file.fileno())
  seconds = time.perf_counter() - began
  shutil.rmtree(to)
  return sum(path.stat().st_size for path in files) / seconds


def main() -> None:
  """Prints one line a conversion."""
  with tempfile.TemporaryDirectory(dir=FOLDER.value) as place:
    source, last = Path(place) / "source", Path(place) / "source"
    synthetic(source)
    os.sync()
    for form, dtype in [("wan", ""), ("comfyui", ""), ("diffusers", ""), ("wan", "bfloat16")]:
      files = sorted(last.glob("*.safetensors"))
      size, shard = sum(file.stat().st_size for file in files), max(file.stat().st_size for file in files)
      copied, to = copy(files, Path(place) / "copy"), Path(place) / f"{form}{dtype}"
      child = subprocess.run([sys.executable, "-c", CHILD, last, to, form, dtype, str(SHARD.value * 1e9)], check=True,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
      seconds, memory = json.loads(child.stdout)
      shard = min(shard, SHARD.value * 1e9)  # the bound asked for, also where all is one file
      print(f"{last.name} -> {form} {dtype or 'as it is'}: {size / 1e9:.2f} GB in {len(files)} files; at most "
            f"{memory / 1e9:.2f} GB resident, bound {1.3 * shard / 1e9 + 1:.2f} GB; {size / seconds / 1e6:.0f} MB/s = "
            f"{size / seconds / copied:.2f} x copying at {copied / 1e6:.0f} MB/s")
      if last != source:
        shutil.rmtree(last)
      last = to


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
