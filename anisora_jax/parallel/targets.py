"""Devices that are not here, to compile for: `KIND:TOPOLOGY`, as "h200:8" or "v5p:2x2x4".

XLA's compilers for TPUs and for CUDA come as wheels and need neither device nor driver: `libtpu`, or
`jax-cuda12-plugin` with `jax-cuda12-pjrt`, in the environment or, so that `import jax` never meets them, in FOLDER.
"""

import importlib.util
import math
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from anisora_jax.errors import BadInput

FOLDER = Path(sys.prefix) / "aot"
GIB = 2**30


class Kind(NamedTuple):
  """A device. memory: GiB of it that a program may use; shape: of the smallest slice, one host; () where any goes."""

  memory: float
  shape: tuple[int, ...]


KINDS = {  # TPUs: what their compiler allows; the card: what its driver tells
  "v5e": Kind(15.75, (2, 2)), "v5p": Kind(95.74, (2, 2, 1)), "v6e": Kind(31.25, (2, 2)), "h200": Kind(140.4, ())}
CARDS, HOST = ("h200",), 8  # of a host
# For libtpu on a machine that is no TPU's: nobody can be asked what it is (any type will do), and nothing is locked.
TPU_LESS = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# What XLA's compiler wants to know of a card: xla/backends/gpu/target_config/specs/h200.txtpb, and NVIDIA's data sheet.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150753771520
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def devices(target: str) -> list[jax.Device]:
  """The devices of a target, which can be compiled for and nothing else.

  Called before the first use of a device: what this process computes itself, it computes on the CPU. Raises BadInput
  for a target that does not exist, or whose compiler is not installed.
  """
  kind, _, shape = target.partition(":")
  if kind not in KINDS:
    raise BadInput(f"target {target!r} is not known ({', '.join(sorted(KINDS))}): write h200:8 or v5p:2x2x4.")
  sizes = [int(size) for size in shape.split("x") if size.isdecimal()]
  least = KINDS[kind].shape or (1,)
  if (not re.fullmatch(r"\d+(x\d+)*", shape) or len(sizes) != len(least)
      or (kind in CARDS and sizes[0] > HOST and sizes[0] % HOST)
      or any(size < 1 or size % unit for size, unit in zip(sizes, least, strict=True))):
    takes, example = " x ".join(f"a multiple of {unit}" for unit in least), "x".join(str(2 * unit) for unit in least)
    if kind in CARDS:
      takes, example = f"a count of cards, above {HOST} a multiple of it", str(HOST)
    raise BadInput(f"target {target!r}: {kind} takes {takes}, for example {kind}:{example}.")
  if command := missing(kind):
    raise BadInput(f"what compiles for {kind} is not installed: {command}")
  jax.config.update("jax_platforms", "cpu")
  return _gpus(math.prod(sizes)) if kind in CARDS else _tpus(target)


def wheels(kind: str) -> list[str]:
  """Requirements for pip, of the versions that this jax goes with."""
  if kind not in CARDS:
    asked = next(line for line in metadata.requires("jax") if line.startswith("libtpu"))
    return [asked.partition(";")[0].strip()]
  return [f"{name}=={jax.__version__}" for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")]


def missing(kind: str) -> str:
  """The command that installs what compiles for a kind, or "" where it is installed; then it can be loaded."""
  if kind in CARDS:
    if str(FOLDER) not in sys.path:
      sys.path.append(str(FOLDER))
    importlib.invalidate_caches()
    there = _found("jax_cuda12_plugin") and _found("jax_plugins.xla_cuda12")
  else:
    library = FOLDER / "libtpu" / "libtpu.so"
    if library.is_file():
      os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
    there = "TPU_LIBRARY_PATH" in os.environ or _found("libtpu")
  return "" if there else f"pip install --no-deps --target {FOLDER} " + " ".join(f"'{x}'" for x in wheels(kind))


def _found(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # the package that would hold it
    return False


def _tpus(target: str) -> list[jax.Device]:
  for name, value in TPU_LESS.items():
    os.environ.setdefault(name, value)
  return topologies.get_topology_desc(platform="tpu", topology_name=target).devices


def _gpus(count: int) -> list[jax.Device]:
  hosts = -(-count // HOST)
  shape = f"1x{hosts}x{count // hosts}"
  return topologies.get_topology_desc(platform="cuda", target_config=H200, topology=shape).devices


def options(mesh: Mesh) -> dict[str, bool]:
  """Of the compiler. Without the card it tries nothing out, and may choose a Triton kernel that then does not compile

  (jaxlib 0.10.2: "Couldn't find output tile sizes"); cuBLAS takes about as much memory.
  """
  away = mesh.devices.flat[0].platform == "gpu" != jax.default_backend()
  return {"xla_gpu_enable_triton_gemm": False} if away else {}


def held(leaf: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on one device."""
  shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def memory(program: jax.stages.Compiled, mesh: Mesh, aside: int = 0, most: int = 0) -> tuple[int, int, int]:
  """(bytes of a device that a program's arguments take, that it takes beside them at most, bytes of its host).

  aside: bytes of arguments that live on the host; most: that the program may take at once to work on them.
  """
  told = program.memory_analysis()
  kept, worked, host = told.argument_size_in_bytes, told.temp_size_in_bytes, told.host_temp_size_in_bytes
  if mesh.devices.flat[0].platform == "tpu":  # there, temp counts memory twice that is used one after the other
    worked = told.peak_memory_in_bytes - host - told.host_argument_size_in_bytes - kept
  elif not told.host_argument_size_in_bytes:
    # A CPU counts its host's memory as a device's, and a card that is not here cannot be told of a host.
    kept, worked = kept - aside, max(worked, most)
  return kept, worked, host + aside


def wanted(error: jax.errors.JaxRuntimeError, kept: int) -> int:
  """Bytes of a device beside those kept that a program needs, if its compiler refused it for that; else raises error.

  XLA's compiler for TPUs says "total memory required for HLO temporaries (83.01G)", or "Used 33.1G of 31.25G hbm".
  """
  found = re.search(r"(temporaries \(|Used )([\d.]+)([KMGT])", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not found:
    raise error
  size = int(float(found[2]) * 2 ** (10 * (1 + "KMGT".index(found[3]))))
  return size if found[1].startswith("temp") else size - kept


def verdict(target: str, needed: int) -> str:
  """Whether a device of a target holds so many bytes, for people."""
  kind = target.partition(":")[0]
  whole, usable, note = KINDS[kind].memory, KINDS[kind].memory, ""
  if kind in CARDS:
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    usable, note = share * whole, f" ({share:g} of {whole:g}, as XLA_PYTHON_CLIENT_MEM_FRACTION allows)"
  fits = "yes" if needed <= usable * GIB else "no"
  if fits == "no" and needed <= 0.95 * whole * GIB:
    fits = "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
  return f"{fits}: {needed / GIB:.1f} of {usable:.1f} GiB{note}"
