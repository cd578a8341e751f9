"""Proposals: meshes, remat policies and microbatches for a recipe on a topology, best first."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import AbstractMesh, AxisType

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import AXES, MeshConfig, Sharding
from step_jax.models.flops import train_flops_per_token
from step_jax.planning import estimate, roofline
from step_jax.planning.plan import Plan, make_plan
from step_jax.planning.program import rows_of, with_known_vocabulary
from step_jax.planning.topology import Topology
from step_jax.runs.console import Console, duration
from step_jax.trainers.pretrain import PretrainConfig

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
    """

    config: PretrainConfig
    flags: str
    nbytes: float
    step_s: float
    serial_s: float
    plan: Plan | None = None


def variants(config: PretrainConfig, topology: Topology) -> Iterator[PretrainConfig]:
    """Every variant that is considered, whether or not its sizes divide."""
    for parallel in _meshes(config, topology):
        for remat, accumulation in itertools.product(_REMAT, _ACCUMULATION):
            yield replace(
                config,
                parallel=parallel,
                execution=replace(config.execution, remat=remat),
                training=replace(config.training, accumulation=accumulation),
            )


def _meshes(config: PretrainConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of all devices, with the axes that the model can use."""
    recipe, T = config.parallel, config.data.sequence_length
    contexts = {n for n in _CONTEXT if T % n == 0 and T // n >= _SHORTEST_PIECE}
    repeat = config.model.trunk.largest_repeat
    sizes = itertools.product(
        [n for n in _STAGES if repeat % n == 0],
        sorted({1, topology.slices}),
        _divisors(_experts(config)),
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


def _experts(config: PretrainConfig) -> int:
    """Into how many shards the experts of every layer can be cut; 1 without experts."""
    counts = [
        kind.count
        for stack in config.model.trunk.walk()
        for kind in getattr(stack.block.mlp, "experts", ())
    ]
    return math.gcd(*counts) if counts else 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _flags(variant: PretrainConfig, recipe: PretrainConfig) -> str:
    names = [*AXES, "pipeline_rounds", "pipeline_microbatches"]
    pairs = [
        (f"parallel.{name}", getattr(variant.parallel, name), getattr(recipe.parallel, name))
        for name in names
    ]
    pairs.append(("execution.remat", variant.execution.remat, recipe.execution.remat))
    pairs.append(
        ("training.accumulation", variant.training.accumulation, recipe.training.accumulation)
    )
    return " ".join(f"--{name} {new}" for name, new, old in pairs if new != old)


def _on_paper(parallel: MeshConfig) -> Sharding:
    """A sharding for arithmetic alone: nothing can be placed on its mesh."""
    sizes = parallel.sizes()
    mesh = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    return Sharding(
        mesh,  # type: ignore[arg-type]
        ring=parallel.ring,
        rounds=parallel.pipeline_rounds,
        microbatches=parallel.pipeline_microbatches,
    )


class _Estimator:
    """Estimates variants of one recipe; what depends on the mesh alone is made once for each."""

    def __init__(self, config: PretrainConfig, topology: Topology):
        self.recipe, self.topology = config, topology
        self._paper = functools.cache(_on_paper)
        self._real = functools.cache(lambda p: Sharding.build(p, topology.devices))

    def __call__(self, variant: PretrainConfig) -> Proposal | None:
        """The variant with its estimates, None if it cannot be laid out."""
        try:
            paper = self._paper(variant.parallel)
            rows = rows_of(variant, paper)
            nbytes = sum(estimate.memory(variant, paper, rows).values())
            on_devices = self.topology.devices is not None
            sharding = self._real(variant.parallel) if on_devices else paper
            times = estimate.step_seconds(variant, self.topology, sharding, rows)
        except ConfigError:  # a size that does not divide
            return None
        return Proposal(variant, _flags(variant, self.recipe), nbytes, *times)


def search(config: PretrainConfig, topology: Topology, compiled: bool = True) -> list[Proposal]:
    """The best proposals, those that fit first, then by time; the first few compiled.

    The recipe as it stands comes last if it can be laid out and is none of them.

    Raises:
      ConfigError: no variant at all can be laid out on the topology.
    """
    config = with_known_vocabulary(config)
    estimated = _Estimator(config, topology)
    found = [p for p in map(estimated, variants(config, topology)) if p is not None]
    if not found:
        raise ConfigError(f"no mesh of {topology.name} divides this model and its batch")
    limit = math.inf if topology.chip is None else MARGIN * topology.chip.hbm_bytes
    found.sort(key=lambda p: (p.nbytes > limit, p.serial_s if p.nbytes <= limit else p.nbytes))
    best = found[:SHOWN]
    if compiled and topology.devices is not None:
        plans = [(make_plan(p.config, topology), p) for p in best[:COMPILED]]
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
                f"{duration(p.plan.step_s)} to {duration(p.plan.serial_s)}, MFU at most "
                f"{p.plan.mfu_bound:.1%}"
            )
        elif topology.chip is not None:
            text += f", MFU at most {_mfu(p, topology):.1%}"
        rows[f"{n}. {p.flags or 'as it stands'}"] = text
    console.table(f"proposals for {topology.name}", rows)


def _mfu(p: Proposal, topology: Topology) -> float:
    """The model's operations at the estimated time over the peak."""
    T, rows = (
        p.config.data.sequence_length,
        p.config.training.rows(p.config.data.sequence_length, 1),
    )
    flops = rows * T * train_flops_per_token(p.config.model, T) / topology.count
    return flops / (p.step_s * roofline.peak(topology, p.config.execution.dtype))
