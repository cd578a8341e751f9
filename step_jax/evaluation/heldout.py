"""Loss, perplexity and bits per byte on text that training never sees.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.inference.generate import cast_params
from step_jax.models.context import Context, Execution
from step_jax.models.decoder import Decoder
from step_jax.models.language_model import token_losses
from step_jax.training.batches import to_mesh

Batch = dict[str, np.ndarray]
Evaluate = Callable[..., dict[str, float]]


def make_evaluator(
    decoder: Decoder, execution: Execution, sharding: Sharding, batch_size: int
) -> Evaluate:
    """A function that scores batches with any parameters of ``decoder``; it compiles once.

    Args:
      batch_size: rows of a batch over all processes.

    Returns:
      ``evaluate(params, batches, bytes_total=None)``, called by every process of a run with its
      own rows (``Heldout.batches``) and parameters laid out on the mesh: the trained ones or their
      moving average, the caller's choice. It returns

      - ``nll``: nats per target, weighted by the batches' weights; next tokens only, without
        multi-token prediction;
      - ``perplexity``: its exponential;
      - ``tokens``: the targets' total weight;
      - ``bits_per_byte``: their total in bits over ``bytes_total``, the UTF-8 bytes that the
        targets spell, if it is given.

      Sums are float32 on the device within a batch and float64 on the host over batches. It raises
      DataError if the batches have no target.
    """

    @jax.jit
    def sums(params, batch):
        params = cast_params(params, execution.dtype)
        ctx = Context(batch["positions"], batch["segments"], sharding=sharding, execution=execution)
        x_BTD, _ = decoder.hidden(params, batch["tokens"], ctx)
        total, _ = token_losses(params, decoder, x_BTD, batch["targets"], batch["weights"], ctx)
        return total, jnp.sum(batch["weights"])

    def evaluate(
        params, batches: Iterable[Batch], bytes_total: int | None = None
    ) -> dict[str, float]:
        nats = tokens = 0.0
        running = None
        for batch in batches:
            following = sums(params, to_mesh(sharding, batch, batch_size))
            # reads the batch before: the next one is made while the device computes
            nats, tokens = _add(nats, tokens, running)
            running = following
        nats, tokens = _add(nats, tokens, running)
        if not tokens:
            raise DataError("there is nothing to evaluate: the batches have no targets")
        return figures(nats, tokens, bytes_total)

    return evaluate


def _add(nats: float, tokens: float, sums) -> tuple[float, float]:
    return (nats, tokens) if sums is None else (nats + float(sums[0]), tokens + float(sums[1]))


def figures(nats: float, tokens: float, bytes_total: int | None = None) -> dict[str, float]:
    """What is reported of a total negative log-likelihood in nats (see ``make_evaluator``)."""
    nll = nats / tokens
    out = {
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "tokens": tokens,
    }
    if bytes_total:
        out["bits_per_byte"] = nats / math.log(2) / bytes_total
    return out
