"""The slot engine's programs for devices that are not here: for plans of serving and rollouts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import bytes_on_device, laid_out
from step_jax.inference.engine import bytes_of_a_slot
from step_jax.inference.requests import MARKS
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.slots import Decoding
from step_jax.training.program import Phase


def abstract_params(decoding: Decoding):
    """Shapes and layouts of the parameters in the compute dtype, as ``ShapeDtypeStruct``."""
    specs, sharding = decoding.decoder.specs(), decoding.sharding
    assert sharding is not None
    cast = jax.eval_shape(decoding.cast, spec_lib.abstract(specs))
    return jax.tree.map(laid_out, cast, sharding.params(specs))


def cache_bytes(decoding: Decoding, slots: int) -> int:
    """What a device holds of the caches of so many slots."""
    assert decoding.sharding is not None
    size = (decoding.decoder, decoding.length, decoding.cache_dtype, decoding.sharding)
    return slots // decoding.sharding.ways("batch") * bytes_of_a_slot(*size)


def reading(decoding: Decoding, rows: int, prompt: int, calls: float = 1.0) -> Phase:
    """Reading so many prompts of so many tokens."""
    assert decoding.sharding is not None
    params = abstract_params(decoding)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Phase(
        name=f"reading {rows:,} prompts of {prompt:,} tokens",
        lower=lambda: decoding.programs().read.lower(
            params, integers((rows, prompt)), integers((rows,)), prompt
        ),
        function="read",
        sharding=decoding.sharding,
        calls=calls,
        reads=bytes_on_device(params),
    )


def writing(decoding: Decoding, slots: int, filled: float = 1.0, calls: float = 1.0) -> Phase:
    """Writing a token in each of so many slots.

    Args:
      filled: share of the caches that is read.
    """
    sharding = decoding.sharding
    assert sharding is not None
    params = abstract_params(decoding)

    def lower():
        empty = jax.eval_shape(lambda: decoding.empty(slots, MARKS))
        like = jax.tree.map(laid_out, empty, decoding.layout())
        one = jax.ShapeDtypeStruct((), jnp.int32)
        return decoding.programs().advance.lower(
            params, like, one, one, sampling=SamplingConfig(), columns=32, thinking=False
        )

    return Phase(
        name=f"writing a token in each of {slots:,} slots",
        lower=lower,
        function="advance",
        sharding=sharding,
        calls=calls,
        reads=bytes_on_device(params) + filled * cache_bytes(decoding, slots),
    )
