"""Compiler options of the tests: a fifth of XLA's time to compile for a CPU; the arithmetic stays the same."""

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
