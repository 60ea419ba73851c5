"""CPU benchmarks: `python -m benchmarks.cpu`."""
