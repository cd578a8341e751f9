"""Texts from prompts: on the slot engine, or as one pure function on the device.

Shape suffixes: B rows, T padded prompt, N new tokens, X marks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.inference.engine import Engine, bucket
from step_jax.inference.requests import Completion, Request, StopReason
from step_jax.inference.sampling import SamplingConfig, row_keys
from step_jax.inference.slots import Decoding, Written
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder


@dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns, one entry per prompt.

    tokens: new tokens, the stop token included.
    logprobs: their log-probabilities (``sampling.sample``), float32 arrays of the same lengths.
    reasons: why a row ended: ``stop`` token, ``length`` (max_new_tokens), ``context`` (full).
    """

    tokens: list[list[int]]
    logprobs: list[np.ndarray]
    reasons: list[StopReason]


def generate(
    params,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_length: int,
    stop_ids: Sequence[int] = (),
    execution: Execution,
    sharding: Sharding | None = None,
    cache_dtype=None,
    requests: Sequence[int] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_end: Callable[[int, Completion], None] | None = None,
    slots: int | None = None,
    chunk: int = 32,
) -> Generation:
    """Continues every prompt.

    What a row writes depends on its prompt, its request number and the seed alone (up to rounding
    of the logits): not on the other rows, on ``slots``, ``chunk`` or the mesh. Shapes are padded to
    powers of two, so calls of similar size share what they compiled.

    Args:
      params: of ``decoder``, any float dtype, laid out on ``sharding``'s mesh if there is one.
      prompts: token ids, what a text begins with included (``Tokenizer.encode_prompt``); every
        process of a run passes the same.
      max_length: the context: what a prompt and its continuation may reach together.
      stop_ids: tokens that end a row.
      cache_dtype: None for the compute dtype.
      requests: numbers that separate the rows' draws; None for 0, 1, ...
      on_tokens: called as ``on_tokens(row, new tokens)`` as they come.
      on_end: called as ``on_end(row, completion)`` as rows end.
      slots: the most rows that are written at a time; None for all.
      chunk: tokens between two looks at the host.

    Raises:
      DataError: a prompt without a token or longer than the context, or a token outside the
        vocabulary.
      ConfigError: ``chunk`` below 1, or as many request numbers as there are not prompts.
    """
    requests = range(len(prompts)) if requests is None else requests
    if len(requests) != len(prompts):
        raise ConfigError(f"{len(requests)} request numbers for {len(prompts)} prompts")
    asked = [
        Request(prompt, sampling.max_new_tokens, (number,))
        for prompt, number in zip(prompts, requests, strict=True)
    ]
    for request in asked:
        request.check(decoder.vocab, max_length)
    longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
    ways = 1 if sharding is None else sharding.ways("batch")
    at_a_time = bucket(len(asked), 1) if slots is None else min(slots, bucket(len(asked), 1))
    engine = Engine(
        decoder,
        sampling,
        slots=-(-at_a_time // ways) * ways,
        max_length=min(bucket(longest), max_length),
        stop_ids=stop_ids,
        execution=execution,
        sharding=sharding,
        cache_dtype=cache_dtype,
        chunk=chunk,
    )
    rows = {id(request): row for row, request in enumerate(asked)}

    def show(request: Request, tokens: list[int]) -> None:
        if on_tokens is not None:
            on_tokens(rows[id(request)], tokens)

    done: dict[int, Completion] = {}
    for completion in engine.run(params, asked, on_tokens=show):
        row = rows[id(completion.request)]
        done[row] = completion
        if on_end is not None:
            on_end(row, completion)
    ordered = [done[row] for row in range(len(asked))]
    return Generation(
        [c.tokens for c in ordered], [c.logprobs for c in ordered], [c.reason for c in ordered]
    )


def rollout(
    params,
    decoder: Decoder,
    prompts_BT,
    lengths_B,
    key,
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int] = (),
    execution: Execution,
    sharding: Sharding | None = None,
    cache_dtype=None,
    max_length: int | None = None,
    requests_B=None,
) -> Written:
    """Writes ``sampling.max_new_tokens`` tokens a row without leaving the device.

    Pure, to be called under ``jit``; not differentiable.

    Args:
      params: of ``decoder``; cast to the compute dtype once.
      prompts_BT: int32, padded on the right with any token.
      lengths_B: int32 lengths of the prompts, at least 1 (a row of 0 writes nothing sensible).
      key: of the draws, in place of ``sampling.seed``.
      stop_ids: tokens that end a row.
      sharding: mesh and rules, or None on one device; B must fit the batch axes.
      cache_dtype: None for the compute dtype.
      max_length: length of the text, prompt included, at which a row ends.
      requests_B: int32 names of the rows for ``sampling.row_keys``; None for 0..B-1.

    Returns:
      Written with N = ``sampling.max_new_tokens``.
    """
    B, T = prompts_BT.shape
    N = sampling.max_new_tokens
    length = T + N if max_length is None else min(T + N, max_length)
    decoding = Decoding.of(decoder, length, execution, sharding, cache_dtype)
    requests_B = jnp.arange(B, dtype=jnp.int32) if requests_B is None else requests_B
    params = decoding.cast(params)
    read_B = jnp.maximum(lengths_B - 1, 0)
    cache, _ = decoding.read(params, prompts_BT, read_B, length)
    limit_B = jnp.minimum(lengths_B + N, length)
    slots = decoding.empty(B, max(1, len(stop_ids)))
    stop_X = jnp.asarray([*stop_ids, *([] if stop_ids else [-1])], jnp.int32)
    slots = replace(
        slots,
        cache=cache,
        keys_B=jax.random.key_data(row_keys(key, requests_B[:, None])),
        conditions=replace(
            slots.conditions,
            token_B=jnp.take_along_axis(prompts_BT, read_B[:, None], axis=1)[:, 0],
            limit_B=limit_B,
            stop_BX=jnp.broadcast_to(stop_X, (B, len(stop_X))),
        ),
        done_B=lengths_B >= limit_B,
    )
    _, written = decoding.advance(params, slots, N, B, sampling, columns=N, thinking=False)
    return written
