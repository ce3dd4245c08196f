"""Compiler options of the tests: a fifth of XLA's time to compile for a CPU; the arithmetic stays the same."""

import jax

QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later XLA has no such option and no need of it
  QUICK["xla_cpu_use_fusion_emitters"] = False
