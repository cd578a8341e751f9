"""Which compiled programs are kept on disk."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from step_jax.core.kept_programs import kept
from step_jax.core.sharding import MeshConfig, Sharding


@pytest.fixture
def folder(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_program_of_one_cpu_device_is_kept_and_one_of_two_is_not(folder, devices):
    sharding = Sharding.build(MeshConfig(fsdp=devices), jax.devices()[:devices])
    like = jax.ShapeDtypeStruct(
        (4, 2), jnp.float32, sharding=sharding.named(("batch", None), (4, 2))
    )
    with kept(sharding.mesh):
        assert jax.config.jax_enable_compilation_cache == (devices == 1)
        jax.jit(lambda x: x.sum() + devices).lower(like).compile()
    assert bool(list(folder.glob("jit_*"))) == (devices == 1)
    assert jax.config.jax_enable_compilation_cache
