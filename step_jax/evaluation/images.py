"""How good drawn digits are, judged by a classifier of real ones.

Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

import numpy as np

from step_jax.data.digits import Digits


def judge_digits(digits: Digits, images_BHWC: np.ndarray, classes_B: np.ndarray):
    """Accuracy by class, and whether the model draws more than one image of a class.

    Args:
      digits: real ones; a support vector machine learns their training part.
      images_BHWC, classes_B: what was drawn, and as what.

    Returns:
      - ``accuracy``: how often the classifier sees the class that was asked for;
      - ``heldout_accuracy``: its accuracy on real held-out digits, for comparison;
      - ``spread``: deviation of a pixel within its class over that of real digits (1 is ideal, 0 is
        one picture a class).
    """
    from sklearn.svm import SVC

    classifier = SVC(gamma=0.02).fit(_flat(digits.images_NFHWC), digits.digits_N)
    real = _spread(digits.images_NFHWC, digits.digits_N)
    return {
        "accuracy": float(classifier.score(_flat(images_BHWC), classes_B)),
        "heldout_accuracy": float(
            classifier.score(_flat(digits.heldout_NFHWC), digits.heldout_digits_N)
        ),
        "spread": float(_spread(images_BHWC, classes_B) / real),
    }


def _flat(images_BHWC):
    return images_BHWC.reshape(len(images_BHWC), -1)


def _spread(images_BHWC, classes_B):
    return np.mean([images_BHWC[classes_B == c].std(0).mean() for c in np.unique(classes_B)])
