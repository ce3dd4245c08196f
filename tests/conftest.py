"""Eight simulated devices, exact matrix products, and every shape in a signature checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("anisora_jax", "beartype.beartype")

import gc
import os

import jax

from anisora_jax.parallel import mesh

# A sixth of XLA's time to compile for a CPU, here and in processes that tests start; the arithmetic stays the same.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later XLA has no such options and no need of them
  QUICK |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": 1}
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in QUICK.items())])

mesh.simulate(8)
jax.config.update("jax_default_matmul_precision", "highest")

# Files whose tests take minutes, in this order before all others, so that no process is left with one of them.
LONG = ("experiment", "processes", "encode", "studio", "schemes", "mesh", "curate", "packing", "wan", "curate_cut")


def pytest_collection_finish() -> None:
  """What was imported is never garbage: the collector need not look through it again and again."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list) -> None:
  names = [f"test_{name}" for name in LONG]
  items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
