"""GPU benchmarks: `python -m benchmarks.gpu`."""
