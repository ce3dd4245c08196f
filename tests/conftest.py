"""Eight simulated devices, exact matrix products, and every shape in a signature checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("anisora_jax", "beartype.beartype")

import jax

from anisora_jax.parallel import mesh

mesh.simulate(8)
jax.config.update("jax_default_matmul_precision", "highest")

# Files whose tests take minutes, in this order before all others, so that no process is left with one of them.
LONG = ("experiment", "processes", "encode", "studio", "schemes", "mesh", "curate", "packing", "wan", "curate_cut")


def pytest_collection_modifyitems(items: list) -> None:
  names = [f"test_{name}" for name in LONG]
  items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
