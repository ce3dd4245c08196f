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
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is timed; the best counts.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Where to work; by default the system's temporary folder.")
CHILD = """
import json, os, resource, shutil, sys, time
from pathlib import Path
from anisora_jax.experiment.convert import convert
path, to, form, dtype, shard = sys.argv[1:]
began = time.perf_counter()
if form == "copy":
  os.mkdir(to)
  for file in sorted(Path(path).glob("*.safetensors")):
    shutil.copyfile(file, Path(to) / file.name)
    with (Path(to) / file.name).open("rb") as copied:
      os.fsync(copied.fileno())
else:
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


def measured(source: Path, to: Path, form: str, dtype: str = "") -> tuple[float, float]:
  """(seconds, bytes resident at most) of one conversion, or of copying, in a process of its own."""
  child = subprocess.run([sys.executable, "-c", CHILD, source, to, form, dtype, str(SHARD.value * 1e9)], check=True,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  shutil.rmtree(to)
  return tuple(json.loads(child.stdout))


def main() -> None:
  """Prints one line a conversion."""
  with tempfile.TemporaryDirectory(dir=FOLDER.value) as place:
    source, to = Path(place) / "source", Path(place) / "to"
    synthetic(source)
    os.sync()
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    bound = 1.3 * max(sizes) + 1e9
    for form, dtype in [("wan", ""), ("comfyui", ""), ("wan", "bfloat16")]:
      # The best of some, by turns and both in new processes: a virtual machine that has given free memory back takes
      # three times as long to fill pages as one that has just freed them.
      turns = [(measured(source, to, "copy")[0], *measured(source, to, form, dtype)) for _ in range(ROUNDS.value)]
      copying, seconds = min(turn[0] for turn in turns), min(turn[1] for turn in turns)
      memory = max(turn[2] for turn in turns)
      print(f"diffusers -> {form} {dtype or 'as it is'}: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files; at most "
            f"{memory / 1e9:.2f} GB resident, bound {bound / 1e9:.2f} GB; {sum(sizes) / 1e6 / seconds:.0f} MB/s = "
            f"{copying / seconds:.2f} x copying at {sum(sizes) / 1e6 / copying:.0f} MB/s, best of {ROUNDS.value}")


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
