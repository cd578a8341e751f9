"""Step Law: peak learning rate and batch size from model and data size (no JAX needed).

Source: "Predictable Scale: Part I, Step Law" (arXiv 2503.04715 v7):

    rate*(N, D) = 1.79 * N^-0.713 * D^0.307        batch*(D) = 0.58 * D^0.571 tokens

N is the number of non-embedding parameters (4 h^2 L + 3 h ffn L there: the matrices of the layers),
D the number of training tokens. Fitted with AdamW (0.9, 0.95, eps 1e-8), weight decay 0.1, clipping
at 1 and a cosine down to a fixed 1e-5, for N from 60M to 1B and D from 2B to 100B; the loss is flat
around the optimum (half to twice of it costs at most about 0.25 %).
"""

from __future__ import annotations

from step_jax.core.errors import ConfigError

FITTED_PARAMETERS = (60e6, 1e9)
FITTED_TOKENS = (2e9, 100e9)
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
