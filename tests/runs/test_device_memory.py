"""A step that needs more memory than a device has is refused before anything is put there."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from step_jax.runs import device_memory
from step_jax.runs.device_memory import DoesNotFit, available, fitting, needed


def compile_product():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return jax.jit(lambda a, b: jnp.tanh(a @ b) @ b, donate_argnums=0).lower(x, x).compile()


def test_donated_arguments_and_their_results_count_once():
    array = 256 * 256 * 4
    assert 3 * array <= needed(compile_product()) < 4 * array  # two arguments, one temporary


def test_limit_is_the_runtimes_the_chips_or_a_part_of_the_machine():
    cpu = jax.devices("cpu")[0]
    assert 1e8 < available(cpu) < 1e13
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5p", memory_stats=lambda: None)
    assert available(tpu) == 103e9
    tpu.memory_stats = lambda: {"bytes_limit": 95 * 2**30}
    assert available(tpu) == 95 * 2**30
    other = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", memory_stats=lambda: None)
    assert available(other) is None


def test_too_large_a_program_is_refused_unless_forced(monkeypatch):
    device = jax.devices()[0]
    assert fitting(compile_product, device) is not None
    monkeypatch.setattr(device_memory, "available", lambda device: 1e5)
    with pytest.raises(DoesNotFit, match=r"needs 0\.0\d+ GB of the 0\.0001 GB") as caught:
        fitting(compile_product, device)
    assert caught.value.program is not None
    assert fitting(compile_product, device, force=True) is not None
    monkeypatch.setattr(device_memory, "available", lambda device: 1e9)
    assert fitting(compile_product, device, beside=10**8) is not None
    with pytest.raises(DoesNotFit, match="a device, of which other arrays take 1 GB"):
        fitting(compile_product, device, beside=10**9)


def test_compilers_that_give_up_are_understood():
    def give_up():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")

    def fail():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: something else")

    with pytest.raises(DoesNotFit, match="Ran out of memory"):
        fitting(give_up, jax.devices()[0], force=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fitting(fail, jax.devices()[0])
