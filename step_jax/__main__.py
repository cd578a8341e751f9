"""``python -m step_jax`` is ``step-jax``."""

import sys

from step_jax.cli.main import main

sys.exit(main())
