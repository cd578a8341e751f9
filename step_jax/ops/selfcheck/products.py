"""Products of sorted groups of rows, and the projection to a vocabulary with its loss.

Shape suffixes: M rows, E groups, D width of a row, F width of a result; N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.ops import cross_entropy, grouped_matmul, registry
from step_jax.ops.einsum import product
from step_jax.ops.selfcheck.case import normal

#: Rows of the groups, in turn: several blocks, none, one, less than a register, whole blocks.
_SIZES = (700, 0, 1, 37, 512, 0, 130, 5)
#: Rows behind the last group, which hold NaN.
_REST = 77


@dataclass(frozen=True)
class GroupedMatmul:
    """``groups`` matrices (width, result) of one device.

    even: rows of every group; 0 for awkward sizes.
    """

    operation: ClassVar[registry.Operation] = grouped_matmul.OPERATION

    implementation: str
    groups: int
    width: int
    result: int
    dtype: str = "bfloat16"
    even: int = 0

    def shapes(self) -> str:
        groups = f"{self.groups} groups of {self.width} x {self.result}"
        return f"{groups}, {self._rows()} rows, {self.dtype}"

    def _sizes_E(self):
        return np.resize(np.array([self.even] if self.even else _SIZES, np.int32), self.groups)

    def _rows(self) -> int:
        return int(self._sizes_E().sum()) + (0 if self.even else _REST)

    def draw(self, key) -> tuple:
        """(x_MD, w_EDF, sizes_E, dy_MF)."""
        sizes_E = self._sizes_E()
        used, rows = int(sizes_E.sum()), self._rows()
        w_EDF = normal(key, 1, (self.groups, self.width, self.result), self.dtype)
        owned_M1 = jnp.arange(rows)[:, None] < used

        def with_rest(number: int, width: int):
            return jnp.where(owned_M1, normal(key, number, (rows, width), self.dtype), jnp.nan)

        return with_rest(0, self.width), w_EDF, jnp.asarray(sizes_E), with_rest(2, self.result)

    def results(self, implementation, device):
        def run(x_MD, w_EDF, sizes_E, dy_MF):
            def forward(x_MD, w_EDF):
                return grouped_matmul.grouped_matmul(
                    x_MD, w_EDF, sizes_E, implementation=implementation, device=device
                )

            y_MF, back = jax.vjp(forward, x_MD, w_EDF)
            return dict(zip(("y", "dx", "dw"), (y_MF, *back(dy_MF)), strict=True))

        return run

    def reference(self):
        def run(x_MD, w_EDF, sizes_E, dy_MF):
            x_MD, w_EDF, dy_MF = (a.astype(jnp.float32) for a in (x_MD, w_EDF, dy_MF))
            y_MF, back = jax.vjp(lambda x, w: grouped_matmul.reference(x, w, sizes_E), x_MD, w_EDF)
            return dict(zip(("y", "dx", "dw"), (y_MF, *back(dy_MF)), strict=True))

        return run

    def operations(self):
        return 6.0 * float(self._sizes_E().sum()) * self.width * self.result

    def traffic(self):
        return 0.0

    def at_work(self, tokens):
        return replace(self, even=1024)


_Z_LOSS = 1e-3


def _with_gradients(forward: Callable, *arguments) -> dict[str, jax.Array]:
    """Of ``forward(x_BTD, w_DV, weights_BT) -> (total, nll_BT)``."""
    gradients = jax.value_and_grad(forward, (0, 1, 2), has_aux=True)
    (total, nll_BT), (dx, dw, dweights) = gradients(*arguments)
    return {"total": total, "nll": nll_BT, "dx": dx, "dw": dw, "dweights": dweights}


@dataclass(frozen=True)
class CrossEntropy:
    """Hidden states of ``width`` on a whole vocabulary, whose head is float32."""

    operation: ClassVar[registry.Operation] = cross_entropy.OPERATION

    implementation: str
    width: int
    vocabulary: int
    tokens: int = 333
    dtype: str = "bfloat16"

    def shapes(self) -> str:
        return f"{self.tokens} tokens of {self.width}, {self.vocabulary} words, {self.dtype}"

    def draw(self, key) -> tuple:
        """(x_BTD, w_DV, targets_BT, weights_BT): both ends of the vocabulary are targets."""
        N, V = self.tokens, self.vocabulary
        w_DV = normal(key, 1, (self.width, V)) * self.width**-0.5
        targets_BT = jax.random.randint(jax.random.fold_in(key, 2), (1, N), 0, V, jnp.int32)
        targets_BT = targets_BT.at[0, :2].set(jnp.array([0, V - 1], jnp.int32))
        return (
            normal(key, 0, (1, N, self.width), self.dtype),
            w_DV,
            targets_BT,
            normal(key, 3, (1, N)),
        )

    def results(self, implementation, device):
        def run(x_BTD, w_DV, targets_BT, weights_BT):
            def forward(x_BTD, w_DV, weights_BT):
                return cross_entropy.cross_entropy(
                    *(x_BTD, w_DV, targets_BT, weights_BT),
                    z_loss=_Z_LOSS,
                    implementation=implementation,
                )

            return _with_gradients(forward, x_BTD, w_DV, weights_BT)

        return run

    def reference(self):
        """All logits at once, in float32, of the head as the kernel sees it."""

        def run(x_BTD, w_DV, targets_BT, weights_BT):
            def forward(x_BTD, w_DV, weights_BT):
                logits_BTV = product("BTD,DV->BTV", x_BTD, w_DV, jnp.float32)
                lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
                hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
                nll_BT = lse_BT - hit_BT
                return jnp.sum(weights_BT * (nll_BT + _Z_LOSS * jnp.square(lse_BT))), nll_BT

            w_DV = w_DV.astype(self.dtype).astype(jnp.float32)
            return _with_gradients(forward, x_BTD.astype(jnp.float32), w_DV, weights_BT)

        return run

    def operations(self):
        return 6.0 * self.tokens * self.width * self.vocabulary

    def traffic(self):
        return 0.0

    def at_work(self, tokens):
        return replace(self, tokens=tokens)
