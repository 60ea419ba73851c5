"""Strict settings for every test: eight virtual CPU devices, no silent promotion."""

import os

# tests decide by name where they run; a GPU or TPU is asked for with JAX_PLATFORMS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# compiling is most of what the suite costs; benchmarks and the programs users run are optimised in full
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
