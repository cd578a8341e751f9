"""Runs before any test module: eight simulated CPU devices, no accelerator by accident."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Compilation makes the first example of a property slow, so a deadline would be noise.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")


@pytest.fixture
def topology(monkeypatch):
    """Name, as ``v6e:2x2``, to the description of TPUs that can be compiled for without them."""
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests compile at the same time
        "TPU_ACCELERATOR_TYPE": "v6e-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name)
