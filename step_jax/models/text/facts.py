"""What a decoder is, in numbers and words: vocabulary, cache, the implementations it runs on."""

from __future__ import annotations

import math
from dataclasses import replace

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.kernels import attention_problem, expert_problems
from step_jax.ops import attention, cross_entropy, grouped_matmul


def with_vocabulary(model: Decoder, vocab_size: int) -> Decoder:
    """The model with the tokenizer's vocabulary, if it has none of its own.

    Raises:
      ConfigError: its own is too small for the tokenizer.
    """
    if not model.vocab:
        return replace(model, vocab=vocab_size)
    if model.vocab < vocab_size:
        raise ConfigError(f"model.vocab is {model.vocab}; the tokenizer has {vocab_size} pieces")
    return model


def cache_bytes_per_token(model: Decoder, bytes_per_number: int = 2) -> int:
    """Bytes that decoding adds for every token; windowed layers stay at one window and add none.

    ``bytes_per_number`` is 2 for a cache of 16 bits.
    """
    entries = (
        (stack.repeat, entry)
        for stack in model.trunk.walk()
        if stack.block.attention.window is None
        for entry in stack.block.attention.cache_entries()
    )
    return bytes_per_number * sum(repeat * math.prod(entry) for repeat, entry in entries)


def implementations(
    model: Decoder, execution: Execution, tokens: int, sharding: Sharding
) -> dict[str, str]:
    """Operation -> ``what was asked for -> what it is computed with``, for rows of ``tokens``.

    Raises:
      ConfigError: an implementation that was named cannot be had on these devices.
    """
    device = sharding.mesh.devices.flat[0]
    names = ", ".join(attention_implementations(model, execution, tokens, sharding))
    values = {"attention": f"{execution.attention} -> {names}"}
    names = ", ".join(grouped_matmul_implementations(model, execution, tokens, sharding))
    if names:
        values["grouped matmul"] = f"{execution.grouped_matmul} -> {names}"
    name = cross_entropy.resolve(execution.loss, cross_entropy.Problem.of(sharding), device)
    return values | {"loss": f"{execution.loss} -> {name}"}


def grouped_matmul_implementations(
    model: Decoder, execution: Execution, tokens: int, sharding: Sharding
) -> list[str]:
    """What the experts' products are computed with, each named once; none without experts."""
    asked, device = execution.grouped_matmul, sharding.mesh.devices.flat[0]
    grouped_matmul.resolve(asked, None, device)  # refused whether used or not
    names = set()
    mlps = (stack.block.mlp for stack in model.trunk.walk())
    for mlp in (mlp for mlp in mlps if isinstance(mlp, MoE)):
        for problem in expert_problems(model.width, mlp, execution, tokens, sharding):
            names.add(grouped_matmul.resolve(asked, problem, device))
    return sorted(names)


def attention_implementations(
    model: Decoder, execution: Execution, tokens: int, sharding: Sharding
) -> list[str]:
    """What the layers' attention is computed with, each named once."""
    device, names = sharding.mesh.devices.flat[0], set()
    for kind in (stack.block.attention for stack in model.trunk.walk()):
        problem = attention_problem(kind, execution, tokens, sharding)
        names.add(attention.resolve(execution.attention, problem, device))
    return sorted(names)
