"""Kernels; importable and tested alone: knows nothing of step_jax."""
