"""Runs before any test module: eight simulated CPU devices, no accelerator by accident."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()

from hypothesis import settings  # noqa: E402

# Compilation makes the first example of a property slow, so a deadline would be noise.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")
