"""Kernels for TPU tensor cores (Mosaic)."""
