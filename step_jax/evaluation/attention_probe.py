"""Where attention looks: whether layers have heads that look one token back, and of induction.

Every row of the probe is a sequence of random tokens that comes twice, so that nothing but looking
back predicts it. A head that looks at the token before scores high by ``previous_token``; one that
looks at the token that followed the same token before, by ``induction`` (Olsson et al.,
arXiv 2209.11895). Equal weights on all that may be seen would score about ``ln(T) / T``.

Shape suffixes: B rows, T tokens of a row, N heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.evaluation.heldout import Evaluate
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens

ROWS = 4
_MOST_TOKENS = 128

Probe = Callable[[Any], dict[str, float]]


def beside(evaluate: Evaluate, probe: Probe) -> Evaluate:
    """An evaluation whose figures are joined by the probe's."""
    return lambda params, heldout: evaluate(params, heldout) | probe(params)


def repeated_tokens(vocab: int, length: int, rows: int = ROWS) -> np.ndarray:
    """int32 (rows, length): random tokens, the second half of a row as its first; always the same.

    Args:
      length: an even number.
    """
    half = np.random.default_rng(0).integers(0, vocab, (rows, length // 2), dtype=np.int32)
    return np.tile(half, 2)


def scores_N(weights_BNTT) -> dict[str, jax.Array]:
    """The mean weight of every head on the place that its score is about, each float32 (N,).

    ``previous_token`` over all tokens but the first; ``induction`` over those of the second half,
    whose token stood T/2 places before.
    """
    half = weights_BNTT.shape[-1] // 2
    return {
        "previous_token": jnp.mean(jnp.diagonal(weights_BNTT, -1, -2, -1), axis=(0, 2)),
        # query T/2 + i sees the same token at i, and what followed it at i + 1
        "induction": jnp.mean(jnp.diagonal(weights_BNTT, 1 - half, -2, -1)[..., 1:], axis=(0, 2)),
    }


def attention_weights(
    params: Any, model: Decoder, tokens_BT: np.ndarray, execution: Execution
) -> list[np.ndarray]:
    """How much each token takes from each: float32 (B, N, T, T) of every layer, rows that sum to 1.

    The weights that the model multiplies its values by, computed on the side.

    Args:
      params: of the model, as an artifact has them.
      tokens_BT: int32, rows of equal length.
      execution: how to compute; layers are not scanned and nothing is computed twice.
    """
    seen = jax.jit(lambda p, tokens_BT: _weights(p, model, tokens_BT, execution))
    return jax.device_get(seen(params, jnp.asarray(tokens_BT)))


def _weights(params, model: Decoder, tokens_BT: jax.Array, execution: Execution):
    """Of every layer, while tracing."""
    seen: list[jax.Array] = []
    execution = replace(execution, scan=False, remat="none")
    ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=execution, observe=seen.append)
    model.hidden(spec_lib.cast(params, execution.dtype, model.specs()), tokens_BT, ctx)
    return seen


def make_probe(
    model: Decoder, execution: Execution, sharding: Sharding, sequence_length: int
) -> Probe:
    """A function that says where the layers of ``model`` look; it compiles once.

    Args:
      execution: how to compute; layers are not scanned and nothing is computed twice.
      sharding: of the parameters; every device computes the whole probe.
      sequence_length: that the model was trained on; rows are no longer.

    Returns:
      ``probe(params)``: for every layer l, ``previous_token/l`` and ``induction/l``, each of the
      head of the layer that scores highest, between 0 and 1; and ``previous_token`` and
      ``induction``, those of the highest layer.
    """
    tokens_BT = repeated_tokens(model.vocab, min(sequence_length, _MOST_TOKENS) // 2 * 2)

    @functools.partial(jax.jit, out_shardings=sharding.replicated())
    def best(params):
        seen = _weights(params, model, jnp.asarray(tokens_BT), execution)
        layers = [{name: jnp.max(s) for name, s in scores_N(w).items()} for w in seen]
        return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}

    def probe(params) -> dict[str, float]:
        by_name: Mapping[str, jax.Array] = jax.device_get(best(params))
        highest = {name: float(scores.max()) for name, scores in by_name.items()}
        return highest | {
            f"{name}/{layer}": float(score)
            for name, scores in by_name.items()
            for layer, score in enumerate(scores)
        }

    return probe
