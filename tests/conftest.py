"""Eight simulated devices, exact matrix products, and every shape in a signature checked while the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("anisora_jax", "beartype.beartype")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
