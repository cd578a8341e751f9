"""The polar factor of Muon in float64 NumPy, transcribed from arXiv 2602.10604 on its own."""

from __future__ import annotations

import numpy as np

A = [8.2872, 4.1071, 3.9487, 3.3184, 2.3007, 1.8913]
B = [-23.5959, -2.9478, -2.9089, -2.4885, -1.6689, -1.2680]
C = [17.3004, 0.5448, 0.5518, 0.5100, 0.4188, 0.3768]


def numpy_polar(g):
    """(R, C) -> (R, C): the six iterations on the singular values, U f(S) V^T."""
    u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    s = s / (1.01 * np.sqrt(np.sum(s**2)))
    for a, b, c in zip(A, B, C, strict=True):
        s = a / 1.01 * s + b / 1.01**3 * s**3 + c / 1.01**5 * s**5
    return u @ np.diag(s) @ vt
