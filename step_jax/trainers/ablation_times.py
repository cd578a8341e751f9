"""How long a training step and a decoded token of several models take, in turns of one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.data.packing import empty_batch
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import Cache
from step_jax.trainers import pretrain, text
from step_jax.trainers.ablation_table import Times

Turn = Callable[[], None]

#: Written in a decoding turn, in one loop, as the engine writes: what does not change from token to
#: token is made once.
TOKENS = 8


def measure(
    configs: Mapping[str, pretrain.Config], models: Mapping[str, Decoder], rounds: int
) -> dict[str, Times]:
    """Medians over rounds in which every variant has its turn, after one that is not counted.

    Args:
      configs: by variant.
      models: their models with a vocabulary.
      rounds: at least 1.
    """
    steps, tokens = {}, {}
    for name, config in configs.items():
        length = config.data.sequence_length
        steps[name] = training_turn(replace(config, model=models[name]))
        tokens[name, length] = decoding_turn(models[name], config.execution, length)
    spent = in_turns({**steps, **tokens}, rounds)
    return {
        name: Times(
            spent[name],
            {key[1]: spent[key] / TOKENS for key in tokens if key[0] == name},
        )
        for name in configs
    }


def in_turns(
    turns: Mapping[Any, Turn], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, float]:
    """Median seconds (wall, unless it is another clock) of every turn over rounds, after one that
    is not counted."""
    spent: dict[Any, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            start = clock()
            turn()
            if number:
                spent[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def training_turn(config: pretrain.Config) -> Turn:
    """A step of the recipe on random tokens, over and over on what it made of its state."""
    sharding, T = Sharding.build(config.parallel), config.data.sequence_length
    built = text.make_program(config, config.decoder, sharding)
    rows = built.batch_like["tokens"].shape[0]
    batch = _random_batch(rows, T, config.decoder.vocab)
    batch = jax.device_put(batch, jax.tree.map(lambda a: a.sharding, dict(built.batch_like)))
    compiled = built.compile()
    state = built.initial_state(rng.fold(0, 0, "parameters"))

    def turn() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return turn


def _random_batch(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
    batch = {name: np.array(a) for name, a in empty_batch(rows, length, pad_id=0).items()}
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length + 1))
    batch["tokens"][:], batch["targets"][:] = tokens[:, :-1], tokens[:, 1:]
    batch["positions"][:], batch["segments"][:], batch["weights"][:] = np.arange(length), 1, 1.0
    return batch


def filled_cache(model: Decoder, length: int, dtype: Any) -> Cache:
    """A cache of one row with ``length`` tokens, and room for one, of random numbers."""
    cache = model.init_cache(1, length + 1, dtype)
    return replace(
        cache,
        layers=jax.tree.map(lambda a: noise(a.shape, a.dtype), cache.layers),
        lengths_B=jnp.full((1,), length, jnp.int32),
    )


def noise(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers of deviation 0.1: drawn on the host, which compiles nothing."""
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(0.1 * drawn, dtype)


def decoding_turn(
    model: Decoder, execution: Execution, length: int, dtype: Any = jnp.bfloat16
) -> Turn:
    """``TOKENS`` tokens after ``length`` cached ones, all of which take the same slot.

    Args:
      dtype: of the cache.
    """
    params = spec_lib.map_specs(lambda spec: noise(spec.shape, jnp.float32), model.specs())
    cache = filled_cache(model, length, dtype)

    def token(params, token_B1, cache: Cache):
        ctx = Context(Tokens(cache.lengths_B[:, None]), execution=execution)
        x_B1D, after, _ = model.hidden(params, token_B1, ctx, cache)
        chosen_B1 = jnp.argmax(model.logits(params, x_B1D, ctx), -1).astype(jnp.int32)
        return chosen_B1, replace(after, lengths_B=cache.lengths_B)

    def tokens(params, cache: Cache):
        first = jnp.zeros((1, 1), jnp.int32), cache
        return jax.lax.fori_loop(0, TOKENS, lambda _, carry: token(params, *carry), first)

    params = spec_lib.cast(params, execution.dtype, model.specs())
    compiled = jax.jit(tokens, donate_argnums=1).lower(params, cache).compile()

    def turn() -> None:
        nonlocal cache
        chosen, cache = compiled(params, cache)
        jax.block_until_ready((chosen, cache))

    return turn
