"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as pictures with captions.

Shape suffixes: N pictures, F frames (one), H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from step_jax.core.errors import DataError

ENGLISH = "zero one two three four five six seven eight nine".split()
CHINESE = "零一二三四五六七八九"
SIZE = (1, 8, 8)


def captions_of(digit: int) -> tuple[str, str]:
    """What a picture of a digit is called, in English and in Chinese."""
    return f"the digit {ENGLISH[digit]}", f"数字{CHINESE[digit]}"


@dataclass(frozen=True)
class Digits:
    """Pictures in [-1, 1], float32 (N, 1, 8, 8, 1), and their digits, int32 (N,).

    The last fifth is held out: it is by other writers. A source of clips (``data.clips``).
    """

    images_NFHWC: np.ndarray
    digits_N: np.ndarray
    heldout_NFHWC: np.ndarray
    heldout_digits_N: np.ndarray
    channels: int = 1
    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    noises_N: None = None

    @classmethod
    def load(cls) -> Digits:
        """Raises DataError without scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError(
                "the digits come with scikit-learn, which is not installed: "
                "pip install scikit-learn"
            ) from None
        data = load_digits()
        images_NFHWC = (data.images / 8.0 - 1.0).astype(np.float32)[:, None, :, :, None]
        digits_N, cut = data.target.astype(np.int32), len(data.images) * 4 // 5
        return cls(images_NFHWC[:cut], digits_N[:cut], images_NFHWC[cut:], digits_N[cut:])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "digits", "clips": len(self.digits_N)}

    @property
    def sizes_N3(self) -> np.ndarray:
        return np.tile(np.array(SIZE), (len(self.digits_N), 1))

    @property
    def names(self) -> list[tuple[str, ...]]:
        """What each of the ten digits is called."""
        return [captions_of(digit) for digit in range(10)]

    @property
    def captions(self) -> list[tuple[str, ...]]:
        return [captions_of(int(digit)) for digit in self.digits_N]

    @property
    def prompts(self) -> tuple[str, ...]:
        """One of each kind of caption, in both languages."""
        return tuple(captions_of(d)[language] for language in (0, 1) for d in range(10))

    def latents(self, i: int) -> np.ndarray:
        return self.images_NFHWC[i]
