"""What the contenders of grpo.py are asked and rewarded for; runs in any peer's Python."""

from __future__ import annotations

import numpy as np

#: A token each; their order is that of the token ids. Nothing among them is white space.
CHARACTERS = "".join(chr(0x4E00 + i) for i in range(256))
#: The token that ends a text has the first id that the model cannot write, so that nothing ends.
END = "<end>"


def reward(reply: str) -> float:
    """The share of characters with an even code."""
    return sum(ord(c) % 2 == 0 for c in reply) / max(1, len(reply))


def left_padded(rows, pad: int) -> np.ndarray:
    """Token ids, the ends of the rows below each other."""
    width = max(map(len, rows))
    return np.asarray([[pad] * (width - len(row)) + list(row) for row in rows], np.int64)


def right_padded(rows, pad: float, dtype=np.int64) -> np.ndarray:
    """The beginnings of the rows below each other."""
    width = max(map(len, rows))
    return np.asarray([list(row) + [pad] * (width - len(row)) for row in rows], dtype)
