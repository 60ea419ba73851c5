"""Strict settings for every test: eight virtual CPU devices, no silent promotion."""

import os

# tests decide by name where they run; a GPU or TPU is asked for with JAX_PLATFORMS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
