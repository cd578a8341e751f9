"""What the forward and the backward attention kernel have in common: grid, blocks and cost.

Shape suffixes: B batch, K key/value heads, G query heads of one key head, T queries, S keys, H
width of queries and keys, V width of values, W visits, X parts of the query heads, L 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rules

LANES = 128
HIDDEN = -1e30  # a score nobody may see; finite: exp2(HIDDEN - LOWEST) is 0, never NaN
LOWEST = 0.5 * HIDDEN  # where row maxima start


def product(a, b, contract: tuple[int, int]):
    """Matrix product over the named axes, accumulated in float32."""
    return rules.dot(a, b, *contract)


def column(row_1T):
    """(1, T) -> (T, L) with every lane the same."""
    return jnp.broadcast_to(row_1T, (LANES, row_1T.shape[1])).T


def across(x_TL, width: int):
    """(T, L) of equal lanes -> (T, width)."""
    return jnp.concatenate([x_TL] * -(-width // LANES), axis=1)[:, :width]


def this_visit(visits_ref, row_visits: int):
    """The visit of this step of the grid; see ``visits``."""
    return visits_ref[pl.program_id(0) * row_visits + pl.program_id(3)]


@dataclass(frozen=True)
class Call:
    """One call of a kernel, whose grid is (B, K * X, blocks of heads in a part, steps).

    visits: (int32 (B, W), steps): see ``visits.plan``; ``steps`` may be traced.
    q, v: arrays (or shapes) (B, K, G, T, H) and (B, K, S, V) of whole blocks.
    sizes: ForwardSizes or BackwardSizes.
    parts: X.
    visited: the share of the visits that is expected to be computed, for what the call costs.
    """

    visits: tuple[Any, Any]
    q: Any
    v: Any
    sizes: Any
    parts: int = 1
    visited: float = 1.0

    @property
    def row_visits(self) -> int:
        return self.visits[0].shape[1]

    @property
    def groups(self) -> int:
        """Blocks of heads in a part."""
        return self.q.shape[2] // self.sizes.heads // self.parts

    def _spec(self, shape, *axes: str):
        """A block that follows the visits; axes named b, k, x (part), g, q, s (keys) or 0."""

        def index(b, kx, g, w, visits):
            visit = visits[b * self.row_visits + w]
            k, x = (kx, 0) if self.parts == 1 else _quotient_and_rest(kx, self.parts)
            place = {
                "b": b, "k": k, "x": x, "g": x * self.groups + g, "0": 0,
                "q": visit >> 16, "s": (visit >> 4) & 0xFFF,
            }  # fmt: skip
            return tuple(place[axis] for axis in axes)

        return pl.BlockSpec(shape, index)

    def tokens(self):
        """Specs of (q positions, q segments, kv positions, kv segments), each (B, 1, tokens)."""
        q = self._spec((1, 1, self.sizes.q_block), "b", "0", "q")
        kv = self._spec((1, 1, self.sizes.kv_block), "b", "0", "s")
        return [q, q, kv, kv]

    def queries(self, width: int):
        """Spec of (B, K, G, T, width)."""
        s = self.sizes
        return self._spec((1, 1, s.heads, s.q_block, width), "b", "k", "g", "q", "0")

    def numbers(self):
        """Spec of (B, K, G, 1, T): one number a query."""
        s = self.sizes
        return self._spec((1, 1, s.heads, 1, s.q_block), "b", "k", "g", "0", "q")

    def keys(self, width: int):
        """Spec of (B, K, S, width)."""
        return self._spec((1, 1, self.sizes.kv_block, width), "b", "k", "s", "0")

    def gradients(self, chunk: int, width: int):
        """Spec of (B, K, X, chunk, width), that stays for all visits of a key head's part."""
        return self._spec((1, 1, 1, chunk, width), "b", "k", "x", "0", "0")

    def run(
        self, kernel, name, arrays, *, in_specs, out_specs, out_shape, scratch, heads_in_order,
        macs, row_bytes, vmem, interpret, aliases=None,
    ):  # fmt: skip
        """The kernel's outputs.

        Args:
          arrays: after the visits; with ``in_specs``.
          scratch: shapes, float32.
          heads_in_order: whether blocks of heads add to one result.
          macs: multiply-adds of one score; row_bytes: moved once for each query.
          aliases: input, counted from the visits on, -> output in the same memory.
        """
        (B, K, G, T, H), V, s = self.q.shape, self.v.shape[-1], self.sizes
        visits_BW, steps = self.visits
        visits = round(visits_BW.size * self.visited)
        pairs = visits * K * G * s.q_block * s.kv_block
        key_bytes = s.kv_block * (H + V) * self.v.dtype.itemsize
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(B, K * self.parts, self.groups, steps),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=out_shape,
            input_output_aliases=aliases or {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(
                    "parallel",
                    "parallel",
                    "arbitrary" if heads_in_order else "parallel",
                    "arbitrary",
                ),
                vmem_limit_bytes=vmem,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * macs,
                transcendentals=pairs,
                bytes_accessed=B * K * G * T * row_bytes + visits * K * (G // s.heads) * key_bytes,
            ),
            interpret=interpret,
            name=name,
        )(visits_BW.reshape(-1), *arrays)


def _quotient_and_rest(n, divisor: int):
    return jax.lax.div(n, divisor), jax.lax.rem(n, divisor)
