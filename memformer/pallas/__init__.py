"""Kernels in Pallas, one package a kind of accelerator."""
