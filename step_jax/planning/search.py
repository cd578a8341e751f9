"""Proposals: meshes, remat policies and microbatches for a recipe on a topology, best first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import AbstractMesh, AxisType

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.models.flops import train_flops_per_token
from step_jax.planning import estimate, roofline
from step_jax.planning.plan import Plan, make_plan
from step_jax.planning.program import resolved, rows_of
from step_jax.planning.topology import Topology
from step_jax.trainers.pretrain import PretrainConfig
from step_jax.training.console import Console, duration

COMPILED = 2  # of the best few
SHOWN = 8
#: Of the memory that the estimate may fill: it does not know every temporary.
MARGIN = 0.9
_TENSOR = (1, 2, 4, 8)
_ACCUMULATION = (1, 2, 4, 8, 16)
_REMAT: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclass(frozen=True)
class Proposal:
    """A variant of the recipe, with its estimates and, for the best few, its plan."""

    config: PretrainConfig
    nbytes: float
    step_s: float
    serial_s: float
    plan: Plan | None = None

    @property
    def flags(self) -> str:
        """What to write after the recipe to get this variant."""
        sizes = self.config.parallel.sizes()
        words = [f"--parallel.{axis} {n}" for axis, n in sizes.items() if n > 1]
        words.append(f"--execution.remat {self.config.execution.remat}")
        words.append(f"--training.accumulation {self.config.training.accumulation}")
        return " ".join(words)


def variants(config: PretrainConfig, topology: Topology) -> Iterator[PretrainConfig]:
    """Every variant that is considered; context stays the recipe's."""
    base = resolved(replace(config, parallel=_fitted(config, topology)), topology.count)
    experts = _experts(base)
    context = base.parallel.context
    for tensor in _TENSOR:
        for expert in (e for e in _divisors(experts) if topology.count % (e * tensor) == 0):
            rest, remainder = divmod(topology.count, tensor * expert * context)
            if remainder:
                continue
            for data in {1, topology.slices}:
                if rest % data:
                    continue
                parallel = replace(
                    base.parallel, data=data, fsdp=rest // data, expert=expert, tensor=tensor
                )
                for remat, accumulation in itertools.product(_REMAT, _ACCUMULATION):
                    yield replace(
                        base,
                        parallel=parallel,
                        execution=replace(base.execution, remat=remat),
                        training=replace(base.training, accumulation=accumulation),
                    )


def _fitted(config: PretrainConfig, topology: Topology):
    """The recipe's mesh, with fsdp taking the rest of whatever number of devices there is."""
    return replace(config.parallel, data=1, fsdp=-1, expert=1, tensor=1)


def _experts(config: PretrainConfig) -> int:
    """Into how many shards the experts of every layer can be cut; 1 without experts."""
    counts = [
        kind.count
        for group in config.model.layers
        for block in group.blocks
        for kind in getattr(block.mlp, "experts", ())
    ]
    return math.gcd(*counts) if counts else 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _sharding(config: PretrainConfig, topology: Topology) -> Sharding:
    if topology.devices is not None:
        return Sharding.build(config.parallel, topology.devices)
    sizes = config.parallel.sizes()
    mesh = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    # arithmetic alone: nothing is placed on the mesh
    return Sharding(mesh, ring=config.parallel.ring)  # type: ignore[arg-type]


def _estimated(config: PretrainConfig, topology: Topology, sharding: Sharding) -> Proposal | None:
    """The variant with its estimates, None if it cannot be laid out."""
    try:
        rows = rows_of(config, sharding)
        sharding.params(config.model.specs())
        nbytes = sum(estimate.memory(config, sharding, rows).values())
        times = estimate.step_seconds(config, topology, sharding, rows)
    except ConfigError:  # a size that does not divide
        return None
    return Proposal(config, nbytes, *times)


def search(config: PretrainConfig, topology: Topology, compiled: bool = True) -> list[Proposal]:
    """The best proposals, those that fit first, then by time; the first few compiled.

    Raises:
      ConfigError: no variant at all can be laid out on the topology.
    """
    found: list[Proposal] = []
    meshes: dict[tuple[int, ...], Sharding] = {}
    for variant in variants(config, topology):
        key = tuple(variant.parallel.sizes().values())
        if key not in meshes:
            meshes[key] = _sharding(variant, topology)
        proposal = _estimated(variant, topology, meshes[key])
        if proposal is not None:
            found.append(proposal)
    if not found:
        raise ConfigError(f"no mesh of {topology.name} divides this model and its batch")
    limit = math.inf if topology.chip is None else MARGIN * topology.chip.hbm_bytes
    found.sort(key=lambda p: (p.nbytes > limit, p.serial_s if p.nbytes <= limit else p.nbytes))
    best = found[:SHOWN]
    if compiled and topology.devices is not None:
        best[:COMPILED] = [replace(p, plan=make_plan(p.config, topology)) for p in best[:COMPILED]]
        best[:COMPILED] = sorted(
            best[:COMPILED],
            key=lambda p: (True, 0.0) if p.plan is None else (not p.plan.fits, p.plan.serial_s),
        )
    return best


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
        rows[f"{n}. {p.flags}"] = text
    console.table(f"proposals for {topology.name}", rows)


def _mfu(p: Proposal, topology: Topology) -> float:
    """The model's operations at the estimated time over the peak."""
    T, rows = (
        p.config.data.sequence_length,
        p.config.training.rows(p.config.data.sequence_length, 1),
    )
    flops = rows * T * train_flops_per_token(p.config.model, T) / topology.count
    return flops / (p.step_s * roofline.peak(topology, p.config.execution.dtype))
