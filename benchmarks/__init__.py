"""Timings side by side: `python -m benchmarks.run`."""
