"""Pallas kernels for TPU (Mosaic TPU)."""
