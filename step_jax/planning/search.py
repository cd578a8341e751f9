"""Proposals: meshes, remat policies and microbatches for a recipe on a topology, best first."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import AXES, MeshConfig, Sharding
from step_jax.data.batches import abstract_batch
from step_jax.models.flops import train_flops_per_token
from step_jax.models.text.decoder import Decoder
from step_jax.planning import estimate, roofline
from step_jax.planning.compiled import Loop, check_rows, execution_of
from step_jax.planning.plan import Plan, make_plan
from step_jax.planning.topology import Topology, paper_devices
from step_jax.runs.console import Console, duration
from step_jax.training.program import Program

COMPILED = 2  # of the best few
SHOWN = 8
#: Of the memory that the estimate may fill: it does not know every temporary.
MARGIN = 0.9
_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 4, 8, 16)
_ACCUMULATION = (1, 2, 4, 8, 16, 32)
_REMAT: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")
#: Shorter pieces of a sequence are not worth the gathering of keys and values.
_SHORTEST_PIECE = 2048


@dataclass(frozen=True)
class Proposal:
    """A variant of the recipe, with its estimates and, for the best few, its plan.

    Attributes:
      flags: what to write after the recipe to get this variant, "" for the recipe itself.
      nbytes, step_s, serial_s: of a device; see ``estimate``.
      mfu: the model's operations at ``step_s`` over the peak.
    """

    config: Any
    flags: str
    nbytes: float
    step_s: float
    serial_s: float
    mfu: float
    plan: Plan | None = None


def variants(config: Any, case: estimate.Case, topology: Topology) -> Iterator[Any]:
    """Every variant that is considered, whether or not its sizes divide.

    Args:
      case: of the recipe as it stands, on any mesh.
    """
    counts = _ACCUMULATION if _accumulation(config) else (None,)
    for parallel in _meshes(config.parallel, case, topology):
        for remat, accumulation in itertools.product(_REMAT, counts):
            variant = replace(
                config, parallel=parallel, execution=replace(config.execution, remat=remat)
            )
            if accumulation:
                training = replace(config.training, accumulation=accumulation)
                variant = replace(variant, training=training)
            yield variant


def _accumulation(config: Any) -> int | None:
    """None for a loop that always takes its batch at once."""
    return getattr(getattr(config, "training", None), "accumulation", None)


def _meshes(recipe: MeshConfig, case: estimate.Case, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of all devices, with the axes that the model can use."""
    T = case.sequence
    contexts = {n for n in _CONTEXT if T % n == 0 and T // n >= _SHORTEST_PIECE}
    repeat = case.model.trunk.largest_repeat
    sizes = itertools.product(
        [n for n in _STAGES if repeat % n == 0],
        sorted({1, topology.slices}),
        _divisors(_experts(case.model)),
        sorted({1, recipe.context} | contexts),
        _TENSOR,
    )
    for stages, data, expert, context, tensor in sizes:
        fsdp, remainder = divmod(topology.count, stages * data * expert * context * tensor)
        if remainder or not fsdp:
            continue
        same = stages == recipe.pipeline
        yield replace(
            recipe,
            pipeline=stages,
            pipeline_rounds=recipe.pipeline_rounds if same else 1,
            pipeline_microbatches=recipe.pipeline_microbatches if same else 0,
            data=data,
            fsdp=fsdp,
            expert=expert,
            context=context,
            tensor=tensor,
        )


def _experts(model: Decoder) -> int:
    """Into how many shards the experts of every layer can be cut; 1 without experts."""
    counts = [
        kind.count
        for stack in model.trunk.walk()
        for kind in getattr(stack.block.mlp, "experts", ())
    ]
    return math.gcd(*counts) if counts else 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _flags(variant: Any, recipe: Any) -> str:
    names = [*AXES, "pipeline_rounds", "pipeline_microbatches"]
    pairs = [
        (f"parallel.{name}", getattr(variant.parallel, name), getattr(recipe.parallel, name))
        for name in names
    ]
    pairs.append(("execution.remat", variant.execution.remat, recipe.execution.remat))
    pairs.append(("training.accumulation", _accumulation(variant), _accumulation(recipe)))
    return " ".join(f"--{name} {new}" for name, new, old in pairs if new != old)


class _Estimator:
    """Estimates variants of one recipe; what depends on less than all of it is made once for each.

    Of a program only the batch can depend on the mesh: on how many devices share its rows. So it is
    made for a mesh of so many, on paper, and its state is laid out on the variant's own.
    """

    def __init__(self, loop: Loop, config: Any, topology: Topology):
        self.loop, self.recipe, self.topology = loop, config, topology
        self._sharding = functools.cache(lambda p: Sharding.build(p, topology.devices))
        self._held = functools.cache(self._held_of)
        self._programs: dict[tuple[int, int | None], Program | None] = {}

    def program(self, config: Any, ways: int = 1) -> Program:
        """The program of a configuration for ``ways`` devices that share the rows."""
        parallel, kind = MeshConfig(data=ways), self.topology.devices[0]
        devices = paper_devices(kind.platform, kind.device_kind, ways)
        return self.loop.program(
            replace(config, parallel=parallel), Sharding.build(parallel, devices)
        )

    def _known(self, variant: Any, ways: int) -> Program | None:
        key = ways, _accumulation(variant)
        if key not in self._programs:
            try:
                self._programs[key] = self.program(variant, ways)
            except ConfigError:  # a size that does not divide
                self._programs[key] = None
        return self._programs[key]

    def _held_of(self, parallel: MeshConfig) -> estimate.Held:
        sharding = self._sharding(parallel)
        program = next(p for p in self._programs.values() if p is not None)
        return estimate.held_bytes(program, sharding)

    def __call__(self, variant: Any) -> Proposal | None:
        """The variant with its estimates, None if it cannot be laid out."""
        try:
            sharding = self._sharding(variant.parallel)
            program = self._known(variant, sharding.ways("batch"))
            if program is None:
                return None
            check_rows(program.schema, sharding, program.accumulation)
            abstract_batch(sharding, program.schema)
            held = self._held(variant.parallel)
            case = estimate.case_of(program, variant.execution, sharding, held)
            assert case is not None, "search() refuses what has no estimates"
            nbytes = sum(estimate.memory(case).values())
            step_s, serial_s = estimate.step_seconds(case, self.topology)
        except ConfigError:  # a size that does not divide
            return None
        flags = _flags(variant, self.recipe)
        flops = case.tokens * train_flops_per_token(case.model, case.sequence)
        peak = roofline.peak(self.topology, case.execution.dtype) * self.topology.count
        return Proposal(variant, flags, nbytes, step_s, serial_s, flops / (step_s * peak))


def search(loop: Loop, config: Any, topology: Topology, compiled: bool = True) -> list[Proposal]:
    """The best proposals, those that fit first, then by time; the first few compiled.

    The recipe as it stands comes last if it can be laid out and is none of them.

    Raises:
      ConfigError: no estimates for what the loop trains, or no variant at all can be laid out on
        the topology.
    """
    estimated = _Estimator(loop, config, topology)
    program = estimated.program(config)
    case = estimate.case_of(program, execution_of(config))
    if case is None:
        kinds = ", ".join(f"{n} ({m.kind})" for n, m in program.models.items())
        raise ConfigError(
            f"only a single decoder of texts can be estimated before it is compiled; this loop "
            f"trains {kinds}: give a mesh, and a topology that can be compiled for, without "
            "--search"
        )
    found = [p for p in map(estimated, variants(config, case, topology)) if p is not None]
    if not found:
        raise ConfigError(f"no mesh of {topology.name} divides this model and its batch")
    limit = math.inf if topology.chip is None else MARGIN * topology.chip.hbm_bytes
    found.sort(key=lambda p: (p.nbytes > limit, p.serial_s if p.nbytes <= limit else p.nbytes))
    best = found[:SHOWN]
    if compiled and not topology.on_paper:
        plans = [(make_plan(loop, p.config, topology), p) for p in best[:COMPILED]]
        plans.sort(key=lambda pair: (not pair[0].fits, pair[0].serial_s))
        best[:COMPILED] = [replace(p, plan=plan) for plan, p in plans]
    return best + _as_it_stands(estimated, best)


def _as_it_stands(estimated: _Estimator, best: list[Proposal]) -> list[Proposal]:
    recipe = estimated.recipe
    try:
        parallel = recipe.parallel.resolve(estimated.topology.count)
    except ConfigError:
        return []
    proposal = estimated(replace(recipe, parallel=parallel))
    if proposal is None or any(p.config == proposal.config for p in best):
        return []
    return [replace(proposal, flags="")]


def show(proposals: list[Proposal], topology: Topology, console: Console) -> None:
    """One line for each proposal."""
    rows = {}
    for n, p in enumerate(proposals, 1):
        text = f"{p.nbytes / 1e9:.3g} GB, {duration(p.step_s)} to {duration(p.serial_s)} estimated"
        if p.plan is not None:
            fits = "fits" if p.plan.fits else "does not fit"
            text += (
                f"; compiled: {p.plan.memory_compiler / 1e9:.3g} GB ({fits}), "
                f"{duration(p.plan.step_s)} to {duration(p.plan.serial_s)}"
            )
        mfu = p.mfu if p.plan is None else p.plan.mfu_bound
        if mfu is not None and (topology.chip is not None or p.plan is not None):
            text += f", MFU at most {mfu:.1%}"
        rows[f"{n}. {p.flags or 'as it stands'}"] = text
    console.table(f"proposals for {topology.name}", rows)
