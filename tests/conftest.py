"""Eight simulated devices, exact matrix products, and every shape in a signature checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("anisora_jax", "beartype.beartype")

import jax

from anisora_jax.parallel import mesh

mesh.simulate(8)
jax.config.update("jax_default_matmul_precision", "highest")
