"""Cached decoding: the engine of ``step-jax generate``, of samples in training and of RL rollouts.

A text starts with one call over the right-padded prompts, then takes one call per token inside a
``while_loop`` that ends early once every row has ended. :func:`rollout` does both in one pure
function; :func:`generate` calls the same two halves from the host, a chunk of tokens at a time.

Shape suffixes: B rows, T padded prompt, N new tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import Sharding
from step_jax.inference.sampling import SamplingConfig, row_keys, sample
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Cache, Decoder
from step_jax.models.tokens import Tokens

StopReason = Literal["stop", "length", "context"]
SMALLEST_BUCKET = 16


@struct.dataclass
class Written:
    """New tokens of a batch, on the device.

    Attributes:
      tokens_BN: int32; the stop token is the last one of its row, 0 follows.
      logprobs_BN: float32, see ``sampling.sample``; 0 where nothing is written.
      lengths_B: int32, how many of the N a row wrote.
      stopped_B: whether the row has ended with a stop token.
    """

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array


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


@struct.dataclass
class _Rows:
    """Texts under way. ``token_B`` is the newest token, not in the cache yet."""

    cache: Cache
    token_B: jax.Array
    limit_B: jax.Array  # length of the text, prompt included, at which a row ends
    requests_B: jax.Array
    done_B: jax.Array
    stopped_B: jax.Array


@dataclass(frozen=True)
class _Engine:
    """Everything static about decoding."""

    decoder: Decoder
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    execution: Execution
    sharding: Sharding | None
    cache_dtype: str

    def start(self, params, prompts_BT, lengths_B, limit_B, requests_B, key, slots: int):
        """Reads the prompts and draws the first tokens: (rows, Written of one token)."""
        B, T = prompts_BT.shape
        index_1T = jnp.arange(T, dtype=jnp.int32)[None]
        order_BT = jnp.where(index_1T < lengths_B[:, None], index_1T, -1)
        cache = self._constrained(self.decoder.init_cache(B, slots, self.cache_dtype))
        x_BTD, cache, _ = self.decoder.hidden(
            params, prompts_BT, self._context(order_BT, fresh=True), cache
        )
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        x_B1D = jnp.take_along_axis(x_BTD, last_B11, axis=1)
        full_B = lengths_B >= limit_B
        rows = _Rows(cache, jnp.zeros(B, jnp.int32), limit_B, requests_B, full_B, full_B & False)
        rows, token_B, logprob_B = self._draw(params, rows, x_B1D, key)
        return rows, self._written(
            token_B[:, None], logprob_B[:, None], (~full_B).astype(jnp.int32), rows.stopped_B
        )

    def advance(self, params, rows: _Rows, key, steps: int):
        """Writes up to ``steps`` tokens: (rows, Written)."""
        B = rows.token_B.shape[0]

        def unfinished(carry):
            step, rows, _ = carry
            return (step < steps) & ~jnp.all(rows.done_B)

        def write(carry):
            step, rows, written = carry
            alive_B = ~rows.done_B
            positions_B1 = jnp.where(alive_B, rows.cache.lengths_B, -1)[:, None]
            x_B1D, cache, _ = self.decoder.hidden(
                params, rows.token_B[:, None], self._context(positions_B1), rows.cache
            )
            rows = rows.replace(cache=self._constrained(cache))
            rows, token_B, logprob_B = self._draw(params, rows, x_B1D, key)
            written = self._written(
                written.tokens_BN.at[:, step].set(token_B),
                written.logprobs_BN.at[:, step].set(logprob_B),
                written.lengths_B + alive_B,
                rows.stopped_B,
            )
            return step + 1, rows, written

        empty = self._written(
            jnp.zeros((B, steps), jnp.int32),
            jnp.zeros((B, steps), jnp.float32),
            jnp.zeros(B, jnp.int32),
            rows.stopped_B,
        )
        _, rows, written = jax.lax.while_loop(unfinished, write, (jnp.int32(0), rows, empty))
        return rows, written

    def _draw(self, params, rows: _Rows, x_B1D, key):
        """The token after the cached text of every row that is not done; 0 for the others."""
        context = self._context(None)
        logits_BV = self.decoder.logits(params, x_B1D, context)[:, 0]
        # ranks are of the whole vocabulary
        logits_BV = context.constrain(logits_BV, "batch", None)
        length_B = rows.cache.lengths_B
        token_B, logprob_B = sample(
            logits_BV, row_keys(key, length_B, rows.requests_B), self.sampling
        )
        alive_B = ~rows.done_B
        token_B, logprob_B = jnp.where(alive_B, token_B, 0), jnp.where(alive_B, logprob_B, 0.0)
        stop_S = jnp.asarray(self.stop_ids, jnp.int32)
        stopped_B = alive_B & jnp.any(token_B[:, None] == stop_S, axis=-1)
        rows = replace(
            rows,
            token_B=token_B,
            done_B=rows.done_B | stopped_B | (length_B + 1 >= rows.limit_B),
            stopped_B=rows.stopped_B | stopped_B,
        )
        return rows, token_B, logprob_B

    def _context(self, order_BT, fresh: bool = False) -> Context:
        tokens = Tokens(order_BT)
        return Context(tokens, fresh=fresh, sharding=self.sharding, execution=self.execution)

    def _constrained(self, cache: Cache) -> Cache:
        """Rows of the cache lie with the batch, key/value heads (if any) with the heads."""
        sharding = self.sharding
        if sharding is None:
            return cache

        def layout(a):
            heads = ("kv_heads", None) if a.ndim == 5 else (None,) * (a.ndim - 3)
            return sharding.constrain(a, None, "batch", None, *heads)

        return replace(cache, layers=jax.tree.map(layout, cache.layers))

    def _written(self, *arrays) -> Written:
        """The same on every device, so that every process can read it."""
        if self.sharding is None:
            return Written(*arrays)
        return Written(*(self.sharding.constrain(a, *(None,) * a.ndim) for a in arrays))


def _engine(decoder, sampling, stop_ids, execution, sharding, cache_dtype) -> _Engine:
    bad = [i for i in stop_ids if not 0 <= i < decoder.vocab]
    if bad:
        raise DataError(f"stop ids {bad} are outside the vocabulary of {decoder.vocab} tokens")
    if sharding is not None:
        # one token has no sequence to split: decoding repeats it along the context axis
        sharding = replace(sharding, rules=(*sharding.rules, ("sequence", ())))
    return _Engine(
        decoder,
        # what is compiled depends on neither of the two
        replace(sampling, seed=0, max_new_tokens=1),
        tuple(sorted(set(stop_ids))),
        execution,
        sharding,
        jnp.dtype(execution.dtype if cache_dtype is None else cache_dtype).name,
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
    engine = _engine(decoder, sampling, stop_ids, execution, sharding, cache_dtype)
    B, T = prompts_BT.shape
    N = sampling.max_new_tokens
    slots = T + N if max_length is None else min(T + N, max_length)
    limit_B = jnp.minimum(lengths_B + N, slots)
    requests_B = jnp.arange(B, dtype=jnp.int32) if requests_B is None else requests_B
    params = spec_lib.cast(params, execution.dtype, decoder.specs())
    rows, first = engine.start(params, prompts_BT, lengths_B, limit_B, requests_B, key, slots)
    if N == 1:
        return first
    _, rest = engine.advance(params, rows, key, N - 1)
    return Written(
        tokens_BN=jnp.concatenate([first.tokens_BN, rest.tokens_BN], axis=1),
        logprobs_BN=jnp.concatenate([first.logprobs_BN, rest.logprobs_BN], axis=1),
        lengths_B=first.lengths_B + rest.lengths_B,
        stopped_B=rest.stopped_B,
    )


@functools.partial(jax.jit, static_argnames=("engine",))
def _cast(params, engine: _Engine):
    return spec_lib.cast(params, engine.execution.dtype, engine.decoder.specs())


@functools.partial(jax.jit, static_argnames=("engine", "slots"))
def _start(params, prompts_BT, lengths_B, limit_B, requests_B, key, engine: _Engine, slots: int):
    return engine.start(params, prompts_BT, lengths_B, limit_B, requests_B, key, slots)


@functools.partial(jax.jit, static_argnames=("engine", "steps"), donate_argnames=("rows",))
def _advance(params, rows, key, engine: _Engine, steps: int):
    return engine.advance(params, rows, key, steps)


def _readable(written: Written, sharding: Sharding | None) -> Written:
    """Whole on every device, so that every process can read it."""
    if sharding is None or sharding.mesh.size == 1:
        return written
    # a constraint inside the program does not bind the layout of what leaves it
    return _whole(sharding)(written)


@functools.cache
def _whole(sharding: Sharding):
    return jax.jit(lambda tree: tree, out_shardings=sharding.replicated())


def bucket(n: int) -> int:
    """The power of two, at least 16, that ``n`` is padded to: few shapes, few compilations."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


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
    chunk: int = 32,
) -> Generation:
    """Continues every prompt.

    What a row writes depends on its prompt, its request number and the seed alone (up to rounding
    of the logits): not on the other rows, on ``chunk`` or on the mesh. Shapes are padded to powers
    of two, so calls of similar size share what they compiled.

    Args:
      params: of ``decoder``, any float dtype, laid out on ``sharding``'s mesh if there is one.
      prompts: token ids, what a text begins with included (``Tokenizer.encode_prompt``); every
        process of a run passes the same.
      max_length: the context: what a prompt and its continuation may reach together.
      stop_ids: tokens that end a row.
      cache_dtype: None for the compute dtype.
      requests: numbers that separate the rows' draws; None for 0, 1, ...
      on_tokens: called as ``on_tokens(row, new tokens)`` while the next ones are computed.
      chunk: tokens between two looks at the host.

    Raises:
      DataError: a prompt without a token or longer than the context, or a token outside the
        vocabulary.
      ConfigError: ``chunk`` below 1, or as many request numbers as there are not prompts.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; it must be at least 1")
    requests = range(len(prompts)) if requests is None else requests
    if len(requests) != len(prompts):
        raise ConfigError(f"{len(requests)} request numbers for {len(prompts)} prompts")
    engine = _engine(decoder, sampling, stop_ids, execution, sharding, cache_dtype)
    texts = [_checked(row, p, decoder.vocab, max_length) for row, p in enumerate(prompts)]
    limits = [min(len(text) + sampling.max_new_tokens, max_length) for text in texts]
    collected = _Collected(len(texts), on_tokens)
    if texts:
        arrays, slots = _padded(texts, limits, requests, max_length, engine.sharding)
        key = jax.random.key(sampling.seed)
        params = _cast(params, engine)
        rows, written = _start(params, *arrays, key, engine, slots)
        left = max(limit - len(text) for limit, text in zip(limits, texts, strict=True)) - 1
        while left > 0 and not collected.ended(limits, texts):
            rows, following = _advance(params, rows, key, engine, chunk)
            collected.add(
                _readable(written, engine.sharding)
            )  # the device is already at the next chunk
            written, left = following, left - chunk
        collected.add(_readable(written, engine.sharding))
    return collected.generation(texts, limits, max_length)


def _checked(row: int, prompt, vocab: int, max_length: int) -> list[int]:
    text = [int(token) for token in prompt]
    if not text:
        raise DataError(
            f"prompt {row} has no token, and the tokenizer none to begin with: write something"
        )
    if len(text) > max_length:
        raise DataError(
            f"prompt {row} has {len(text)} tokens, more than the context of {max_length} tokens "
            "that the model was trained with: shorten it"
        )
    bad = next((token for token in text if not 0 <= token < vocab), None)
    if bad is not None:
        raise DataError(
            f"prompt {row} has the token {bad}, outside the vocabulary of {vocab} tokens: was it "
            "made with another tokenizer?"
        )
    return text


def _padded(texts, limits, requests, max_length: int, sharding: Sharding | None):
    """((prompts_BT, lengths_B, limit_B, requests_B) on the device, cache slots)."""
    B, T = 1 << (len(texts) - 1).bit_length(), bucket(max(map(len, texts)))
    if sharding is not None:
        ways = sharding.ways("batch")
        B = -(-B // ways) * ways
    prompts_BT = np.zeros((B, T), np.int32)
    columns = np.zeros((3, B), np.int32)  # rows beyond the prompts have length 0 and limit 0
    for row, text in enumerate(texts):
        prompts_BT[row, : len(text)] = text
        columns[:, row] = len(text), limits[row], requests[row]
    arrays, slots = [prompts_BT, *columns], min(bucket(max(limits)), max_length)
    if sharding is None:
        return arrays, slots
    layouts = [sharding.named(("batch", None)[: a.ndim], a.shape) for a in arrays]
    return jax.device_put(arrays, layouts), slots


class _Collected:
    """What has arrived on the host."""

    def __init__(self, rows: int, on_tokens: Callable[[int, list[int]], None] | None):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self.stopped = [False] * rows
        self.on_tokens = on_tokens

    def add(self, written: Written) -> None:
        written = jax.device_get(written)
        self.stopped = written.stopped_B[: len(self.tokens)].tolist()
        for row, n in enumerate(written.lengths_B[: len(self.tokens)]):
            if n == 0:
                continue
            new = written.tokens_BN[row, :n].tolist()
            self.tokens[row] += new
            self.logprobs[row].append(np.asarray(written.logprobs_BN[row, :n]))
            if self.on_tokens is not None:
                self.on_tokens(row, new)

    def ended(self, limits, texts) -> bool:
        rows = zip(self.tokens, self.stopped, limits, texts, strict=True)
        return all(stopped or len(new) >= limit - len(text) for new, stopped, limit, text in rows)

    def generation(self, texts, limits, max_length: int) -> Generation:
        reasons: list[StopReason] = []
        for row, (text, stopped) in enumerate(zip(texts, self.stopped, strict=True)):
            full = len(text) + len(self.tokens[row]) >= max_length
            reasons.append("stop" if stopped else "context" if full else "length")
        return Generation(
            tokens=self.tokens,
            logprobs=[
                np.concatenate(parts) if parts else np.zeros(0, np.float32)
                for parts in self.logprobs
            ],
            reasons=reasons,
        )
