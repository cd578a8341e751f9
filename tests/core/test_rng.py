from __future__ import annotations

import itertools

import jax

from step_jax.core.rng import fold


def bits(*args, **kwargs):
    return tuple(jax.random.key_data(fold(*args, **kwargs)).tolist())


def test_every_argument_separates_and_equal_arguments_repeat():
    cases = list(itertools.product((0, 1), (0, 1, 2), ("sample", "dropout"), (0, 1)))
    keys = [bits(*case) for case in cases]
    assert len(set(keys)) == len(keys)
    assert keys == [bits(*case) for case in cases]


def test_a_traced_step_or_a_key_for_a_seed_gives_the_same_key():
    traced = jax.jit(lambda step, i: jax.random.key_data(fold(3, step, "loss", i)))
    assert tuple(traced(5, 2).tolist()) == bits(3, 5, "loss", 2)
    assert bits(jax.random.key(3), 5, "loss", 2) == bits(3, 5, "loss", 2)


def test_a_purpose_does_not_depend_on_the_process_s_hash_seed():
    """A golden value: ``hash(str)`` would differ in every process and host."""
    assert bits(0, 0, "sample") == (3209745185, 1777925753)
