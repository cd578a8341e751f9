"""A decoder as a policy: it writes answers, and is asked how likely they were.

Shape suffixes: B rows, N tokens of an answer, T tokens of prompt and answer but one, D model width.
"""

from __future__ import annotations

import jax.numpy as jnp

from step_jax.core.sharding import Sharding
from step_jax.inference.generate import rollout
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens
from step_jax.training.losses.text import token_losses


def write_answers(
    params,
    model: Decoder,
    prompts,
    key,
    sampling: SamplingConfig,
    execution: Execution,
    sharding: Sharding | None = None,
):
    """One answer to every prompt, as a batch to learn from.

    Pure, to be called under ``jit``; not differentiable.

    Args:
      prompts: int32 (B, any), all of one length.
      sampling: answers have exactly ``max_new_tokens`` tokens.

    Returns:
      dict of ``written_BN`` int32, and of (B, T): ``tokens`` and ``targets`` int32, ``answer``
      float32, 1 where the target is part of the answer, ``logprobs`` float32 of these targets.
    """
    B, length = prompts.shape
    lengths_B = jnp.full(B, length, jnp.int32)
    written = rollout(
        params, model, prompts, lengths_B, key, sampling, execution=execution, sharding=sharding
    )
    text = jnp.concatenate([prompts, written.tokens_BN], axis=1)
    before = ((0, 0), (length - 1, 0))
    return {
        "written_BN": written.tokens_BN,
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "answer": jnp.pad(jnp.ones(written.tokens_BN.shape), before),
        "logprobs": jnp.pad(written.logprobs_BN, before),
    }


def weighted_nll(
    params,
    model: Decoder,
    batch,
    weights_BT,
    execution: Execution,
    sharding: Sharding | None = None,
):
    """(sum of ``weights * -log p(target)``, differentiable; the -log p themselves, (B, T), not).

    With advantages as weights, the first one's gradient is the policy gradient.
    """
    tokens_BT = batch["tokens"]
    ctx = Context(Tokens.in_order(*tokens_BT.shape), sharding=sharding, execution=execution)
    x_BTD, *_ = model.hidden(params, tokens_BT, ctx)
    return token_losses(params, model, x_BTD, batch["targets"], weights_BT, ctx)
