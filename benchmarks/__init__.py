"""Benchmarks: `python -m benchmarks.cpu`, `python -m benchmarks.gpu`, `python -m benchmarks.tpu.static`."""
