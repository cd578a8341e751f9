"""``python -m step_jax.cli`` is ``step-jax``."""

from step_jax.cli.main import console

console()
