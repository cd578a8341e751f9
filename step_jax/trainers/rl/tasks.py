"""Tasks whose answers can be checked.

Shape suffixes: P prompts, T tokens of a prompt, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

SYMBOLS = "0123456789="


@dataclass(frozen=True)
class Sorting:
    """``digits`` random digits and ``=`` ask for these digits in rising order: 382=238.

    ids: the tokens that stand for the characters of ``SYMBOLS``.
    """

    digits: int
    ids: tuple[int, ...]

    def draw(self, key, prompts: int):
        """(prompts_PT, answers_PN), int32; T is N + 1. Pure."""
        digits_PN = jax.random.randint(key, (prompts, self.digits), 0, 10)
        asked_PT = jnp.pad(digits_PN, ((0, 0), (0, 1)), constant_values=SYMBOLS.index("="))
        ids = jnp.asarray(self.ids, jnp.int32)
        return ids[asked_PT], ids[jnp.sort(digits_PN, axis=1)]

    def text(self, tokens: Iterable[int]) -> str:
        """What the tokens say; ``?`` for those of no symbol."""
        symbols = dict(zip(self.ids, SYMBOLS, strict=True))
        return "".join(symbols.get(int(token), "?") for token in tokens)
