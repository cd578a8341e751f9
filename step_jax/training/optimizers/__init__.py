"""Optimizers. ``config`` is importable without JAX; ``build`` makes the optimizer it names."""
