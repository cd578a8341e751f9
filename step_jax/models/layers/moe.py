"""Mixture of experts: routed, shared and partially shared gated perceptrons.

Shape suffixes: B rows, T tokens of a row, N tokens of one device (n of one pass), D model width,
F hidden width, E experts, e experts of one shard, M sorted assignments, K experts per token.

``y = shared(x) + sum_k w_k expert_k(x)``. Who goes where is ``routing.py``, who finds room there
``capacity.py``, how tokens get to the devices of their experts ``expert_parallel.py``; here is what
an expert computes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.hardware import has_ragged_all_to_all
from step_jax.core.sharding import varying_axes
from step_jax.core.spec import ParamSpec
from step_jax.models.context import Context
from step_jax.models.layers import capacity
from step_jax.models.layers.expert_parallel import Exchange, apply_experts, rows_needed
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.mlp import SwiGLU, gated_unit
from step_jax.models.layers.routing import Router
from step_jax.ops.grouped_matmul import grouped_matmul

#: Fewer tokens of a device are never cut into passes (see ``MoE.passes``): their buffers are small.
SMALLEST_PASS = 256


@dataclass(frozen=True)
class Experts:
    """``count`` routed experts of ``hidden`` units each."""

    count: int
    hidden: int


@struct.dataclass
class ExpertParams:
    gate_EDF: Any
    up_EDF: Any
    down_EFD: Any


@struct.dataclass
class MoEParams:
    router_DE: Any
    bias_E: Any
    experts: tuple[ExpertParams, ...]
    shared: Any
    common: Any


@struct.dataclass
class ExpertStats:
    """What one layer's experts did with one batch; sums, so that microbatches add up.

    Attributes:
      tokens, load_E, probability_E, squared, entropy, confidence: see ``routing.Routing``.
      square_E: sum over the rows an expert computed of the mean square of its hidden activations.
      dropped_E: assignments that found no room with their expert, part of ``load_E``.
      chosen_BTK: the decisions, if ``ctx.record_routing``, else None.
    """

    tokens: jax.Array
    load_E: jax.Array
    probability_E: jax.Array
    squared: jax.Array
    entropy: jax.Array
    confidence: jax.Array
    square_E: jax.Array
    dropped_E: jax.Array
    chosen_BTK: jax.Array | None


@dataclass(frozen=True)
class MoE:
    """A mixture of SwiGLU experts.

    experts: one entry, or several for heterogeneous experts (experts of unlike width, reported of
      Step-2); expert numbers run through the entries in order.
    router: who goes where.
    shared: hidden units of the shared expert that every token visits; 0 for none.
    common: hidden units that all routed experts have in common (partial parameter sharing, reported
      of Step-2): each expert computes them beside its own, so that a token's result holds them
      once, times the sum of its weights. 0 for none.
    clamp, shared_clamp: of the routed and the shared experts' factors, see ``SwiGLU``.
    exchange: how tokens reach their experts (``models.expert_parallel``); null is ``ragged`` where
      the hardware has it and ``gather`` elsewhere.
    capacity: None drops nothing; else what an expert has room for in training, in multiples of an
      even load (``models.layers.capacity``). What finds no room is dropped and counted.
    """

    kind: ClassVar[str] = "moe"
    experts: tuple[Experts, ...]
    router: Router
    shared: int = 0
    common: int = 0
    clamp: float | None = None
    shared_clamp: float | None = None
    exchange: Exchange | None = None
    capacity: float | None = None

    def validate(self):
        if not self.experts or any(c.count < 1 or c.hidden < 1 for c in self.experts):
            raise ConfigError(f"a mixture needs experts with hidden units, not {self.experts}")
        self.router.check(self.total)
        if self.capacity is not None and self.capacity <= 0:
            raise ConfigError(f"capacity is {self.capacity}; use a positive number or null")
        checks.at_least(self, shared=0, common=0)
        checks.above(self, clamp=0, shared_clamp=0)

    @property
    def total(self) -> int:
        """Number of routed experts."""
        return sum(c.count for c in self.experts)

    def specs(self, width: int, init: Initialisation) -> MoEParams:
        router_DE, bias_E = self.router.specs(width, self.total, init)
        active = self.router.top_k / self.total

        def experts(c: Experts) -> ExpertParams:
            axes = ("experts", "embed", "mlp")
            read = ParamSpec((c.count, width, c.hidden), axes, init.matrix(width), active=active)
            output = init.mlp_output(c.hidden)
            down_axes = ("experts", "mlp", "embed")
            down = ParamSpec((c.count, c.hidden, width), down_axes, output, active=active)
            return ExpertParams(read, read, down)

        return MoEParams(
            router_DE=router_DE,
            bias_E=bias_E,
            experts=tuple(experts(c) for c in self.experts),
            shared=self._shared.specs(width, init) if self.shared else None,
            common=self._common.specs(width, init) if self.common else None,
        )

    @property
    def _shared(self) -> SwiGLU:
        return SwiGLU(self.shared, self.shared_clamp)

    @property
    def _common(self) -> SwiGLU:
        return SwiGLU(self.common, self.clamp)

    def apply(self, p: MoEParams, x_BTD, ctx: Context, chosen_BTK=None):
        """(y_BTD, ExpertStats).

        Args:
          chosen_BTK: int32 routing decisions to replay, None to decide.

        Raises:
          ConfigError: more expert shards than experts, or a number that does not divide.
        """
        counted_BT = ctx.tokens.counted_BT()
        routing = self.router.apply(p.router_DE, p.bias_E, x_BTD, counted_BT, chosen_BTK)
        y_BTD, square_E, dropped_E = self._routed(p, x_BTD, routing, ctx)
        if self.common:
            total_BT1 = jnp.sum(routing.weight_BTK, -1, keepdims=True).astype(x_BTD.dtype)
            y_BTD += total_BT1 * self._common.apply(p.common, x_BTD, ctx)[0]
        if self.shared:
            y_BTD += self._shared.apply(p.shared, x_BTD, ctx)[0]
        return y_BTD, ExpertStats(
            tokens=routing.tokens,
            load_E=routing.load_E,
            probability_E=routing.probability_E,
            squared=routing.squared,
            entropy=routing.entropy,
            confidence=routing.confidence,
            square_E=jax.lax.stop_gradient(square_E),
            dropped_E=jax.lax.stop_gradient(dropped_E),
            chosen_BTK=routing.chosen_BTK if ctx.record_routing else None,
        )

    def shard_order(self, shards: int) -> np.ndarray:
        """Place of every expert when experts stand shard after shard: int32 (E,).

        A shard holds an equal part of every entry of ``experts``.

        Raises:
          ConfigError: ``shards`` does not divide the number of experts of each entry.
        """
        places, first = np.zeros(self.total, np.int32), 0
        size = self.total // shards
        inside = 0
        for c in self.experts:
            if c.count % shards:
                more = "more shards than experts" if shards > c.count else "a rest"
                raise ConfigError(
                    f"{c.count} experts on parallel.expert {shards} shards leave {more}; use a "
                    f"divisor of {c.count}"
                )
            each = c.count // shards
            index = np.arange(c.count)
            places[first : first + c.count] = index // each * size + inside + index % each
            first, inside = first + c.count, inside + each
        return places

    def buffer_rows(self, tokens: int, parts: int, shards: int, *, limited: bool = True) -> int:
        """Rows of a shard's buffer for every row of text that one of its devices has a part of.

        Args:
          tokens: of a whole row, of which a device has one of ``parts`` equal parts.
          limited: to the room of ``capacity``, if there is one.
        """
        K, room = self.router.top_k, None
        if limited and self.capacity is not None:
            room = capacity.room(tokens, K, self.total, self.capacity)
            room *= capacity.pieces_touched(tokens, parts)
        return rows_needed(tokens // parts, K, shards, self.total // shards, room)

    def passes(self, tokens: int, shards: int) -> int:
        """In how many passes a device's ``tokens`` go to their experts where nothing is dropped.

        As many as make buffers for whatever comes as large as those of an even load times
        ``capacity``: what can be trained can be evaluated as well.
        """
        if self.capacity is None:
            return 1
        even = self.router.top_k * self.capacity
        worst = rows_needed(1, self.router.top_k, shards, self.total // shards)
        return max(1, min(math.ceil(worst / even), tokens // SMALLEST_PASS))

    def _routed(self, p: MoEParams, x_BTD, routing, ctx: Context):
        """(y_BTD, square_E, dropped_E) of the routed experts, on the whole mesh."""
        sharding = ctx.sharding
        shards = 1 if sharding is None else sharding.size("expert")
        places_E = self.shard_order(shards)
        # decisions as places; assignments of padding go nowhere
        counted_BT1 = ctx.tokens.counted_BT()[..., None]
        place_BTK = jnp.where(counted_BT1, jnp.asarray(places_E)[routing.chosen_BTK], self.total)
        arguments = (p.experts, x_BTD, place_BTK, routing.weight_BTK)
        if sharding is None or sharding.mesh.size == 1:
            y_BTD, square_e, dropped_E = self._on_device(*arguments, ctx=ctx, shards=1)
        else:
            tokens = sharding.spec(("batch", "sequence"), x_BTD.shape[:2])
            specs = self.specs(x_BTD.shape[-1], FanIn()).experts
            weights = sharding.partition_specs(specs)

            def local(*arguments):
                return self._on_device(*arguments, ctx=ctx, shards=shards)

            y_BTD, square_e, dropped_E = sharding.shard_map(
                local,
                in_specs=(weights, tokens, tokens, tokens),
                out_specs=(tokens, PartitionSpec("expert"), PartitionSpec()),
            )(*arguments)
        return y_BTD, square_e[places_E], dropped_E[places_E]

    def _on_device(self, experts, x_BTD, place_BTK, weight_BTK, *, ctx: Context, shards: int):
        """The same on one device, with its tokens and its experts' weights, in order of places."""
        mesh = None if ctx.sharding is None or ctx.sharding.mesh.size == 1 else ctx.sharding
        if mesh:
            experts = tuple(_whole_width(e) for e in experts)
        parts = mesh.size("context") if mesh else 1
        (B, T, D), K = x_BTD.shape, place_BTK.shape[-1]
        passes = 1
        if ctx.within_capacity and self.capacity is not None:
            room = capacity.room(T * parts, K, self.total, self.capacity)
            axis = "context" if parts > 1 else None
            place_BTK, dropped_E = capacity.fitted(place_BTK, self.total, room, axis)
            rows = B * self.buffer_rows(T * parts, parts, shards)
        else:
            passes, dropped_E = self.passes(B * T, shards), jnp.zeros(self.total)
            rows = self.buffer_rows(-(-B * T // passes), 1, shards, limited=False)
        one_pass = functools.partial(self._one_pass, experts, rows=rows, ctx=ctx, shards=shards)
        tokens = x_BTD.reshape(-1, D), place_BTK.reshape(-1, K), weight_BTK.reshape(-1, K)
        y_ND, square_e = _in_passes(one_pass, tokens, (0, self.total, 0), passes)
        if not mesh:
            return y_ND.reshape(B, T, D), square_e, dropped_E
        of_tokens = (*mesh.mesh_axes("batch"), *mesh.mesh_axes("sequence"))
        elsewhere = (a for a in of_tokens if a != "expert")
        square_e = _total(jax.lax.stop_gradient(square_e), *elsewhere, "tensor")
        dropped_E = _total(dropped_E, *of_tokens)
        return _total(y_ND, "tensor").reshape(B, T, D), square_e, dropped_E

    def _one_pass(self, experts, x_nD, place_nK, weight_nK, *, rows: int, ctx: Context, shards):
        """(y_nD, square_e) of some of a device's tokens, all of which find room in ``rows``."""
        ragged = has_ragged_all_to_all(ctx.device)

        def compute(rows_MD, sizes_e):
            # an even load; buffers are larger
            return self._experts(experts, rows_MD, sizes_e, place_nK.size, ctx)

        return apply_experts(
            compute,
            x_nD,
            place_nK,
            weight_nK,
            shards=shards,
            shard_experts=self.total // shards,
            exchange=self.exchange or ("ragged" if ragged else "gather"),
            rows=rows,
            emulate=not ragged,
        )

    def _experts(self, experts, rows_MD, sizes_e, load: int, ctx: Context):
        """(rows_MD, square_e) of rows sorted by expert; ``load`` of them are expected."""
        if len(experts) == 1:
            return self._one_width(experts[0], rows_MD, sizes_e, self.experts[0].hidden, load, ctx)
        y_MD, squares, first = jnp.zeros_like(rows_MD), [], 0
        for c, p in zip(self.experts, experts, strict=True):
            count = p.gate_EDF.shape[0]
            start, sizes_c = jnp.sum(sizes_e[:first]), sizes_e[first : first + count]
            mine_MD = jnp.roll(rows_MD, -start, axis=0)
            part = load * c.count // self.total
            out_MD, square_c = self._one_width(p, mine_MD, sizes_c, c.hidden, part, ctx)
            y_MD += jnp.roll(out_MD, start, axis=0)
            squares.append(square_c)
            first += count
        return y_MD, jnp.concatenate(squares)

    def _one_width(self, p: ExpertParams, rows_MD, sizes_e, hidden: int, load: int, ctx: Context):
        """(rows_MD, square_e): experts of one width; rows past the sizes come out zero."""

        def product(x_MI, w_EIO):
            w_EIO = w_EIO.astype(x_MI.dtype)
            return grouped_matmul(
                x_MI,
                w_EIO,
                sizes_e,
                implementation=ctx.execution.grouped_matmul,
                device=ctx.device,
                load=load,
            )

        gate_MF = checkpoint_name(product(rows_MD, p.gate_EDF), "mlp")
        up_MF = checkpoint_name(product(rows_MD, p.up_EDF), "mlp")
        hidden_MF = gated_unit(gate_MF, up_MF, self.clamp)
        square_M = jnp.sum(jnp.square(jax.lax.stop_gradient(hidden_MF).astype(jnp.float32)), -1)
        stop_e = jnp.cumsum(sizes_e)
        index_M = jnp.arange(rows_MD.shape[0])
        mine_eM = (index_M >= (stop_e - sizes_e)[:, None]) & (index_M < stop_e[:, None])
        square_e = jnp.sum(jnp.where(mine_eM, square_M, 0.0), axis=1) / hidden
        return product(hidden_MF, p.down_EFD), square_e


def _in_passes(one_pass, arrays, fills, passes: int):
    """``one_pass(*arrays)``, (result of every row, sum), in turn on ``passes`` parts of the rows.

    Args:
      fills: one number for each array, of the rows that make the last part as long as the others.
    """
    if passes == 1:
        return one_pass(*arrays)
    N = arrays[0].shape[0]
    n = -(-N // passes)

    def cut(a, fill):
        a = jnp.pad(a, ((0, passes * n - N), *((0, 0),) * (a.ndim - 1)), constant_values=fill)
        return a.reshape(passes, n, *a.shape[1:])

    # checkpointed: a gradient would else keep the buffers of all passes
    again = jax.checkpoint(one_pass, prevent_cse=False)
    rows, sums = jax.lax.map(lambda part: again(*part), tuple(map(cut, arrays, fills)))
    return rows.reshape(passes * n, *rows.shape[2:])[:N], jnp.sum(sums, axis=0)


def _total(x, *axes: str):
    """The sum over those mesh axes on which devices have different ``x``."""
    axes = tuple(axis for axis in axes if axis in varying_axes(x))
    return jax.lax.psum(x, axes) if axes else x


def _whole_width(p: ExpertParams) -> ExpertParams:
    """FSDP undone on this device: weights are all-gathered, their gradients reduce-scattered."""

    def gathered(w, axis: int):
        cut = tuple(a for a in ("fsdp", "context") if a in varying_axes(w))
        return jax.lax.all_gather(w, cut, axis=axis, tiled=True) if cut else w

    return ExpertParams(gathered(p.gate_EDF, 1), gathered(p.up_EDF, 1), gathered(p.down_EFD, 2))
