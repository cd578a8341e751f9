"""Scores of answers by a reward model.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Artifact
from step_jax.core import spec as spec_lib
from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.models.context import Context
from step_jax.models.text.reward import RewardModel
from step_jax.models.tokens import Tokens
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import encode_answer


def score(
    artifact: Artifact,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    sharding: Sharding | None = None,
    rows: int = 16,
) -> np.ndarray:
    """How good the last answer of each conversation is: float32 (n,), of any scale and origin.

    Two scores tell by their difference: the log-odds that the one answer is the better, if both
    are answers to the same messages.

    Args:
      artifact: of a reward model.
      conversations: messages that end with one of the assistant.
      rows: conversations computed together.

    Raises:
      CheckpointError: a model of another kind.
      DataError: no chat template, a malformed conversation, or one that is longer than the model's
        context; it is named by its number.
    """
    model = artifact.require(RewardModel, "a score")
    length, execution = artifact.context_of_text, artifact.execution

    @jax.jit
    def last_B(params, tokens_BT, lengths_B):
        params = spec_lib.cast(params, execution.dtype, model.specs())
        tokens = Tokens.in_order(*tokens_BT.shape)
        ctx = Context(tokens, sharding=sharding, execution=execution)
        scores_BT, _ = model.scores(params, tokens_BT, ctx)
        return jnp.take_along_axis(scores_BT, lengths_B[:, None] - 1, axis=1)[:, 0]

    made = []
    for first in range(0, len(conversations), rows):
        some = conversations[first : first + rows]
        ids = [
            answer_ids(artifact.tokenizer, messages, length, f"conversation {first + i}")
            for i, messages in enumerate(some)
        ]
        tokens_BT, lengths_B = padded(ids, rows, length, artifact.tokenizer.pad_id)
        made.append(np.asarray(last_B(artifact.params, tokens_BT, lengths_B))[: len(some)])
    return np.concatenate([np.zeros(0, np.float32), *made])


def answer_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], length: int, name: str
) -> np.ndarray:
    """Token ids of a conversation and the end of its last answer; DataError if over ``length``."""
    if tokenizer.chat_template is None:
        raise DataError(f"{tokenizer.name} has no chat template: it renders no conversations")
    ids, _ = encode_answer(tokenizer, tokenizer.chat_template, messages, record=name)
    if len(ids) > length:
        raise DataError(f"{name} has {len(ids):,} tokens; the model's context is {length:,}")
    return ids


def padded(ids: Sequence[np.ndarray], rows: int, length: int, pad_id: int):
    """(int32 (rows, length) with each of ``ids`` at the beginning of a row, int32 lengths)."""
    tokens_BT = np.full((rows, length), pad_id, np.int32)
    for row, some in enumerate(ids):
        tokens_BT[row, : len(some)] = some
    lengths = [len(some) for some in ids] + [1] * (rows - len(ids))
    return tokens_BT, np.asarray(lengths, np.int32)
