"""Pairwise judging: of two answers the better, shown in both orders.

Shape suffixes: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Artifact
from step_jax.core import spec as spec_lib
from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.evaluation.rewards import answer_ids, padded
from step_jax.models.context import Context
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens

QUESTION = """Which answer is better?

Question: {question}

Answer A: {first}

Answer B: {second}

Reply with A or B."""


class Shown(NamedTuple):
    """What a judge sees: a question and two answers in their order."""

    question: str
    first: str
    second: str


#: what is shown -> the log-odds of each that the answer shown first is the better
Judge = Callable[[Sequence[Shown]], Sequence[float]]


@dataclass(frozen=True)
class Tally:
    """What a judge said of pairs of ours and theirs, each shown in both orders.

    Attributes:
      wins, losses: pairs in which both orders agree on ours, on theirs.
      ties: pairs in which they do not agree, or the judge makes no difference.
      first: share of the showings with a difference in which the answer shown first was chosen: 0.5
        for a judge that does not care about the order.
    """

    wins: int
    losses: int
    ties: int
    first: float

    @property
    def pairs(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> float:
        """Share of pairs won, a tie counting half."""
        return (self.wins + self.ties / 2) / self.pairs

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Of the rate, by Wilson (1927); 95 % by default. Ties make it wider than it need be."""
        n, rate = self.pairs, self.rate
        centre, scale = rate + z * z / (2 * n), 1 + z * z / n
        half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
        return (centre - half) / scale, (centre + half) / scale

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.rate:.1%} of {self.pairs} pairs ({low:.1%} to {high:.1%}): {self.wins} won, "
            f"{self.losses} lost, {self.ties} tied; position bias: the answer shown first was "
            f"chosen {self.first:.1%} of the time"
        )


def compare(judge: Judge, pairs: Sequence[Shown], margin: float = 0.0) -> Tally:
    """The tally of pairs whose ``first`` is ours; every one is shown in both orders.

    Args:
      margin: log-odds up to which a showing makes no difference.

    Raises:
      DataError: no pairs, or a judge that does not answer each with a number.
    """
    if not pairs:
        raise DataError("there is nothing to compare: no pair of answers")
    swapped = [Shown(pair.question, pair.second, pair.first) for pair in pairs]
    said = np.asarray(list(judge([*pairs, *swapped])), np.float64)
    if said.shape != (2 * len(pairs),) or not np.isfinite(said).all():
        raise DataError(
            f"the judge gave {said.size} numbers to {2 * len(pairs)} showings, "
            f"{int((~np.isfinite(said)).sum())} of them not finite: it must give each one log-odds"
        )
    chosen = np.sign(np.where(np.abs(said) <= margin, 0.0, said))
    ours = chosen[: len(pairs)], -chosen[len(pairs) :]
    wins, losses = (int(((ours[0] == s) & (ours[1] == s)).sum()) for s in (1, -1))
    decided = chosen[chosen != 0]
    first = float((decided > 0).mean()) if decided.size else 0.5
    return Tally(wins, losses, len(pairs) - wins - losses, first)


def generative(
    artifact: Artifact,
    sharding: Sharding | None = None,
    question: str = QUESTION,
    rows: int = 16,
) -> Judge:
    """A language model as a judge: the log-odds of its replying A instead of B.

    Args:
      question: what it is asked, with ``{question}``, ``{first}`` and ``{second}``.
      rows: showings computed together.
    """
    model, tokenizer = artifact.require(Decoder, "a judge"), artifact.tokenizer
    length, execution = artifact.context_of_text, artifact.execution

    @jax.jit
    def odds_B(params, tokens_BT, at_B, letters_B2):
        params = spec_lib.cast(params, execution.dtype, model.specs())
        tokens = Tokens.in_order(*tokens_BT.shape)
        ctx = Context(tokens, sharding=sharding, execution=execution)
        x_BTD, *_ = model.hidden(params, tokens_BT, ctx)
        x_B1D = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)
        logits_BV = model.logits(params, x_B1D, ctx)[:, 0]
        logits_B2 = jnp.take_along_axis(logits_BV, letters_B2, axis=1)
        return logits_B2[:, 0] - logits_B2[:, 1]

    def judge(shown: Sequence[Shown]) -> list[float]:
        made: list[float] = []
        for begin in range(0, len(shown), rows):
            some = shown[begin : begin + rows]
            ids, letters = [], np.zeros((rows, 2), np.int32)
            for i, one in enumerate(some):
                asked = {"role": "user", "content": question.format(**one._asdict())}
                a, b = (
                    answer_ids(
                        tokenizer,
                        [asked, {"role": "assistant", "content": letter}],
                        length,
                        f"showing {begin + i}",
                    )
                    for letter in "AB"
                )
                n = int(np.argmax(a[: len(b)] != b[: len(a)]))  # where the replies part
                ids.append(a[:n])
                letters[i] = a[n], b[n]
            tokens_BT, lengths_B = padded(ids, rows, length, tokenizer.pad_id)
            odds = odds_B(artifact.params, tokens_BT, lengths_B - 1, letters)
            made += np.asarray(odds)[: len(some)].tolist()
        return made

    return judge
