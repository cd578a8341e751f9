"""From logits to tokens: temperature, top-k, top-p and min-p, one independent draw a row.

Shape suffixes: B rows, V vocabulary, K candidates in descending order.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from step_jax.core import checks
from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and how many are written.

    temperature: divides the logits before anything else; 0 takes the most probable token.
    top_k: only the k most probable tokens; 0 for all.
    top_p: only the most probable tokens that together reach this probability (arXiv 1904.09751),
      counted after ``top_k``; the token that crosses it is kept. 1 for all.
    min_p: only tokens at least this fraction as probable as the best one (arXiv 2407.01082).
    seed: of the draws.
    max_new_tokens: the most that a row writes.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (most probable token) or more"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1], 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be in [0, 1], 0 for all tokens")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        checks.seed(self.seed)


def row_keys(key, names_BM, counts_B=None):
    """A key per row from its name alone: neither other rows of a batch nor padding enter.

    Args:
      names_BM: uint32, the numbers of each row's name.
      counts_B: how many of the M each name has; None for all.
    """
    M = names_BM.shape[1]
    counts_B = jnp.full(names_BM.shape[:1], M) if counts_B is None else counts_B
    purpose = jax.random.fold_in(key, zlib.crc32(b"sample"))

    def fold(name_M, count):
        folded = purpose
        for i in range(M):
            folded = jnp.where(i < count, jax.random.fold_in(folded, name_M[i]), folded)
        return folded

    return jax.vmap(fold)(names_BM.astype(jnp.uint32), counts_B)


def draw_keys(keys_B, places_B):
    """The keys of one draw a row, for the token at ``places_B`` of its text."""
    return jax.vmap(jax.random.fold_in)(keys_B, places_B)


def sample(logits_BV, keys_B, config: SamplingConfig, banned_BX=None):
    """Draws a token per row.

    The draw is ``argmax(logits / temperature + Gumbel noise)`` over the tokens that top-k, top-p
    and min-p leave. The noise belongs to the token, not to its rank. Of equal logits the lower
    token ranks first, so ``top_k`` keeps exactly k.

    Args:
      logits_BV: float32.
      keys_B: one key per row (``draw_keys``).
      banned_BX: int32 tokens that are not drawn, V for none; None bans nothing. One filter more.

    Returns:
      (tokens_B int32, logprobs_B float32). ``logprobs_B`` is the token's log-probability under
      ``softmax(logits / temperature)`` over the whole vocabulary, before top-k, top-p and min-p:
      what a policy gradient calls the policy (at temperature 0: under ``softmax(logits)``).
    """
    B, V = logits_BV.shape
    if config.temperature:
        logits_BV = logits_BV / config.temperature
    shown_BV = logits_BV
    if banned_BX is not None:
        rows_B1 = jnp.arange(B)[:, None]
        shown_BV = logits_BV.at[rows_B1, banned_BX].set(-jnp.inf, mode="drop")
    if config.temperature == 0:
        return _with_logprobs(logits_BV, jnp.argmax(shown_BV, axis=-1))
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_B)
    if not (config.top_k or config.top_p < 1 or config.min_p):
        return _with_logprobs(logits_BV, jnp.argmax(shown_BV + noise_BV, axis=-1))
    sorted_BK, token_BK = jax.lax.top_k(shown_BV, min(config.top_k or V, V))
    keep_BK = _keep(sorted_BK, config)
    drawn_BK = sorted_BK + jnp.take_along_axis(noise_BV, token_BK, axis=-1)
    rank_B1 = jnp.argmax(jnp.where(keep_BK, drawn_BK, -jnp.inf), axis=-1, keepdims=True)
    return _with_logprobs(logits_BV, jnp.take_along_axis(token_BK, rank_B1, axis=-1)[:, 0])


def _keep(sorted_BK, config: SamplingConfig):
    """Which of the candidates top-p and min-p leave; the first one always."""
    keep_BK = jnp.ones(sorted_BK.shape, bool)
    if config.top_p < 1:
        p_BK = jax.nn.softmax(sorted_BK, axis=-1)
        keep_BK &= jnp.cumsum(p_BK, axis=-1) - p_BK < config.top_p
    if config.min_p:
        keep_BK &= sorted_BK >= sorted_BK[:, :1] + math.log(config.min_p)
    return keep_BK


def _with_logprobs(logits_BV, tokens_B):
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
