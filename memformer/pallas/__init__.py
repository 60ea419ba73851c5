"""Pallas kernels: one package per accelerator, and what they share."""
