"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from step_jax.core.errors import DataError
from step_jax.data.schema import Field, Schema


@dataclass(frozen=True)
class Digits:
    """Images in [-1, 1], float32 (B, 8, 8, 1), and their classes, int32 (B,).

    The last fifth is held out: it is by other writers.
    """

    images_BHWC: np.ndarray
    classes_B: np.ndarray
    heldout_BHWC: np.ndarray
    heldout_classes_B: np.ndarray

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
        images_BHWC = (data.images / 8.0 - 1.0).astype(np.float32)[..., None]
        classes_B, cut = data.target.astype(np.int32), len(data.images) * 4 // 5
        return cls(images_BHWC[:cut], classes_B[:cut], images_BHWC[cut:], classes_B[cut:])

    def batch(self, seed: int, step: int, batch_size: int, index: int = 0, count: int = 1):
        """Part ``index`` of ``count`` of the training batch of a step: images and classes.

        A pure function of its arguments; the parts of a batch do not depend on ``count``.
        """
        chosen_B = np.random.default_rng((seed, step)).integers(
            len(self.classes_B), size=batch_size
        )
        chosen_B = np.split(chosen_B, count)[index]
        return {"images": self.images_BHWC[chosen_B], "classes": self.classes_B[chosen_B]}


def digits_schema(rows: int) -> Schema:
    """What `Digits.batch` gives."""
    return {
        "images": Field(("batch", None, None, None), (rows, 8, 8, 1)),
        "classes": Field(("batch",), (rows,), "int32"),
    }
