"""TPU benchmarks without a TPU: `python -m benchmarks.tpu.static`, `.compile`, `.train_step`."""
