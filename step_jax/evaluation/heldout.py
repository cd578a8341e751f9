"""Loss, perplexity and bits per byte on text that training never sees.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.data import Heldout
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.packing import text_schema
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens
from step_jax.training.losses.text import token_losses

Evaluate = Callable[[Any, Heldout], dict[str, float]]


def make_evaluator(
    decoder: Decoder,
    execution: Execution,
    sharding: Sharding,
    batch_size: int,
    sequence_length: int,
) -> Evaluate:
    """A function that scores held-out text with any parameters of ``decoder``; it compiles once.

    Args:
      batch_size: rows of a batch over all processes.
      sequence_length: tokens of a row.

    Returns:
      ``evaluate(params, heldout)``, called by every process of a run with parameters laid out on
      the mesh: the trained ones or their moving average, the caller's choice. It returns

      - ``nll``: nats per target token (the closing eos of every document included), next tokens
        only, without multi-token prediction;
      - ``perplexity``: its exponential;
      - ``bits_per_byte``: all targets' bits over the documents' UTF-8 bytes; left out where the
        tokenizer loses part of the text (``heldout.lossy``), whose bytes nobody predicts;
      - ``tokens``: number of targets.

      Sums are float32 on the device within a batch and float64 on the host over batches. It raises
      DataError if there is no target.
    """

    schema = text_schema(batch_size, sequence_length)

    @jax.jit
    def sums(params, batch):
        params = spec_lib.cast(params, execution.dtype, decoder.specs())
        ctx = Context(Tokens.packed(batch), sharding=sharding, execution=execution)
        x_BTD, *_ = decoder.hidden(params, batch["tokens"], ctx)
        total, _ = token_losses(params, decoder, x_BTD, batch["targets"], batch["weights"], ctx)
        return total, jnp.sum(batch["weights"])

    def evaluate(params, heldout: Heldout) -> dict[str, float]:
        index, count = process_rows(sharding, batch_size)
        batches = heldout.batches(
            batch_size, sequence_length, process_index=index, process_count=count
        )
        nats = tokens = 0.0
        running = None
        for batch in batches:
            following = sums(params, to_mesh(sharding, schema, batch))
            # reads the batch before: the next one is made while the device computes
            nats, tokens = _add(nats, tokens, running)
            running = following
        nats, tokens = _add(nats, tokens, running)
        if not tokens:
            raise DataError("there is nothing to evaluate: no document is held out")
        return figures(nats, tokens, None if heldout.lossy else heldout.bytes)

    return evaluate


def _add(nats: float, tokens: float, sums) -> tuple[float, float]:
    return (nats, tokens) if sums is None else (nats + float(sums[0]), tokens + float(sums[1]))


def figures(nats: float, tokens: float, text_bytes: int | None) -> dict[str, float]:
    """What is reported of a total negative log-likelihood (see ``make_evaluator``)."""
    nll = nats / tokens
    known = {} if text_bytes is None else {"bits_per_byte": nats / math.log(2) / text_bytes}
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return {"nll": nll, "perplexity": perplexity, **known, "tokens": tokens}
