"""Animation video diffusion transformers in JAX: train, sample, evaluate, convert."""
