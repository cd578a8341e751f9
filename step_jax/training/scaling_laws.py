"""Scaling laws: Step Law's rates and batch sizes, and laws fitted to runs (no JAX needed).

Step Law is "Predictable Scale: Part I, Step Law" (arXiv 2503.04715 v7):

    rate*(N, D) = 1.79 * N^-0.713 * D^0.307        batch*(D) = 0.58 * D^0.571 tokens

N is the number of non-embedding parameters (4 h^2 L + 3 h ffn L there: the matrices of the layers),
D the number of training tokens. Fitted with AdamW (0.9, 0.95, eps 1e-8), weight decay 0.1, clipping
at 1 and a cosine down to a fixed 1e-5, for N from 60M to 1B and D from 2B to 100B; the loss is flat
around the optimum (half to twice of it costs at most about 0.25 %).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from step_jax.core.errors import ConfigError

FITTED_PARAMETERS = (60e6, 1e9)
FITTED_TOKENS = (2e9, 100e9)
_HUBER = 1e-3
_STARTS = 8
_NOMINAL = 0.1  # the paper names its sizes loosely: its "1B" model has 1.074e9 such parameters


def step_law_learning_rate(parameters: float, tokens: float) -> float:
    """Peak AdamW rate for ``parameters`` non-embedding parameters and ``tokens`` tokens."""
    _positive(parameters=parameters, tokens=tokens)
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch_tokens(tokens: float) -> float:
    """Batch size in tokens for a run of ``tokens`` training tokens (independent of the model)."""
    _positive(tokens=tokens)
    return 0.58 * tokens**0.571


def step_law_batch_rows(tokens: float, sequence_length: int, multiple: int = 1) -> int:
    """:func:`step_law_batch_tokens` as rows of ``sequence_length`` tokens.

    Rounded to the nearest multiple of ``multiple`` (what the mesh and the accumulation divide the
    batch by), at least one multiple.
    """
    _positive(sequence_length=sequence_length, multiple=multiple)
    rows = step_law_batch_tokens(tokens) / sequence_length
    return max(1, round(rows / multiple)) * multiple


def step_law_extrapolation(parameters: float, tokens: float) -> str | None:
    """A sentence that says where (N, D) leaves the fitted range; None inside of it."""
    outside = [
        f"{name} {value:.3g} is {'below' if value < low else 'above'} {low:.3g} to {high:.3g}"
        for name, value, (low, high) in (
            ("non-embedding parameters", parameters, FITTED_PARAMETERS),
            ("training tokens", tokens, FITTED_TOKENS),
        )
        if not low * (1 - _NOMINAL) <= value <= high * (1 + _NOMINAL)
    ]
    return "Step Law is extrapolated: " + "; ".join(outside) if outside else None


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"Step Law needs a positive {name.replace('_', ' ')}, not {value}")


# --- laws of one's own runs -----------------------------------------------------------------------


def best_value(values: Sequence[float], losses: Sequence[float]) -> float:
    """Where the loss is lowest between the values that were tried.

    The minimum of the parabola, in the logarithm of the value, through the lowest loss and its two
    neighbours; the lowest one itself where it lies at the border.

    Args:
      values: positive, ascending (learning rates, batch sizes).
      losses: infinite for runs that diverged.
    """
    _positive(**{f"value {value:g}": value for value in values})
    i = min(range(len(losses)), key=lambda i: losses[i])
    if i in (0, len(values) - 1) or not all(map(math.isfinite, losses[i - 1 : i + 2])):
        return values[i]
    x, y = np.log(values[i - 1 : i + 2]), np.asarray(losses[i - 1 : i + 2])
    curvature, slope, _ = np.polyfit(x - x[1], y, 2)
    return float(values[i] * np.exp(-slope / (2 * curvature))) if curvature > 0 else values[i]


def fit_power_law(inputs: Sequence[Sequence[float]], outputs: Sequence[float]) -> list[float]:
    """``[c, a, b, ...]`` of ``output = c * x^a * y^b * ...``: least squares of the logarithms.

    Step Law's form for the best rate of (N, D).

    Args:
      inputs: (points, variables), positive.
      outputs: (points,), positive.

    Raises:
      ConfigError: the points do not fix every exponent: there are too few, or a variable never
        changes by itself.
    """
    x, y = np.log(np.asarray(inputs, float)), np.log(np.asarray(outputs, float))
    columns = np.column_stack([np.ones(len(x)), x])
    if np.linalg.matrix_rank(columns, tol=1e-6) < columns.shape[1]:
        raise ConfigError(
            f"{len(x)} points do not fix {columns.shape[1]} numbers of a power law: vary every "
            "input, and not all of them together"
        )
    (log_c, *exponents), *_ = np.linalg.lstsq(columns, y, rcond=None)
    return [float(np.exp(log_c)), *map(float, exponents)]


@dataclass(frozen=True)
class ScalingLaw:
    """``loss = E + A / N^alpha + B / D^beta`` (Hoffmann et al., arXiv 2203.15556, equation 2).

    Attributes:
      floor: E, nats per token.
      a, alpha: of the parameters N.
      b, beta: of the training tokens D.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Held-out nats per token of a model of ``parameters`` after ``tokens``."""
        return self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta

    def best_parameters(self, flops: float) -> float:
        """N of the lowest loss for ``flops = 6 N D`` (equation 4 there); D is ``flops / 6 N``."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        return g * (flops / 6) ** (self.beta / (self.alpha + self.beta))


def fit_scaling_law(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]
) -> ScalingLaw:
    """The law of a table of runs: the third approach of Hoffmann et al., arXiv 2203.15556.

    The least sum of Huber losses (delta 1e-3) between the logarithms of law and loss, from the best
    of their grid of starts. It is a sum and no mean, whose gradients would let L-BFGS stop early
    (Besiroglu et al., arXiv 2404.10102).

    Args:
      parameters, tokens, losses: of each run, positive.

    Raises:
      ConfigError: fewer than five runs, or one size or one length only.
    """
    from scipy.optimize import minimize

    log_n, log_d, log_l = (np.log(np.asarray(x, float)) for x in (parameters, tokens, losses))
    sizes, lengths = len(set(parameters)), len(set(tokens))
    if len(log_l) < 5 or sizes < 2 or lengths < 2:
        raise ConfigError(
            f"a scaling law of five numbers is not fixed by {len(log_l)} runs of {sizes} sizes and "
            f"{lengths} lengths: train five or more, with two or more of each"
        )

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        log_a, log_b, log_e, alpha, beta = p
        parts = np.stack([log_a - alpha * log_n, log_b - beta * log_d, np.full_like(log_n, log_e)])
        top = parts.max(axis=0)
        shares = np.exp(parts - top)
        total = shares.sum(axis=0)
        residual = top + np.log(total) - log_l
        shares /= total
        slope = np.clip(residual, -_HUBER, _HUBER)
        huber = slope * (residual - slope / 2)
        by_part = slope * shares
        gradient = [*by_part, -by_part[0] * log_n, -by_part[1] * log_d]
        return float(huber.sum()), np.array([g.sum() for g in gradient])

    grid = itertools.product(
        (0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1),
        (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2),
    )  # fmt: skip
    # of the 4,500 starts those that are nearest already
    starts = sorted(grid, key=lambda p: objective(np.array(p, float))[0])[:_STARTS]
    options = {"maxiter": 5000, "ftol": 1e-13, "gtol": 1e-9}
    found = [minimize(objective, p, jac=True, method="L-BFGS-B", options=options) for p in starts]
    log_a, log_b, log_e, alpha, beta = min(found, key=lambda result: result.fun).x
    return ScalingLaw(*map(float, (np.exp(log_e), np.exp(log_a), alpha, np.exp(log_b), beta)))
