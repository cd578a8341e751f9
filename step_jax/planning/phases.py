"""Programs that run between a loop's steps, or serve: what each asks of a device, compiled for it.

All figures are bounds of the compiled programs (``planning.roofline``), none is a forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from step_jax.planning import collectives, hlo, operations, roofline
from step_jax.planning.compiled import dumped, parsed
from step_jax.planning.topology import Topology, crosses_slices
from step_jax.training.program import Phase


@dataclass(frozen=True)
class Stock:
    """What was found of a phase; figures of one device and call (of writing: one token a slot).

    Attributes:
      name, calls, held, beside: see ``training.program.Phase``.
      memory: bytes that it takes in all, beside ``held``; None if it does not fit.
      flops, traffic, compute_s, memory_s, network_s, bound_s, bound_by: see ``planning.plan.Plan``.
    """

    name: str
    calls: float
    held: float
    beside: bool
    memory: int | None
    flops: float
    traffic: float
    compute_s: float
    memory_s: float
    network_s: dict[str, float]
    bound_s: float
    bound_by: str
    compile_cpu_s: float
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Of a step of the loop."""
        return self.calls * self.bound_s

    def misfit(self, limit: float | None) -> str:
        """Why it has no room on a device of so many bytes; "" if it has."""
        if self.memory is None:
            return f"{self.name}: {' '.join(self.notes)}"
        if limit is None or self.memory + self.held <= limit:
            return ""
        needs = f"{self.name} needs {self.memory / 1e9:.3g} GB"
        return f"{needs} beside {self.held / 1e9:.3g} GB that others keep, of {limit / 1e9:.3g} GB"


def take_stock(phase: Phase, topology: Topology, dtype: str) -> Stock:
    """Compiles a phase; a loop of unknown length, over tokens, counts one turn."""
    lowered, mesh = phase.lower(), phase.sharding.mesh
    found = dumped(
        lambda options: lowered.compile(compiler_options=options), phase.function, topology
    )
    module = parsed(found)
    executions, _ = hlo.executions(module)
    across = next((a for a in mesh.axis_names if crosses_slices(mesh, [a])), None)
    slices = (across, topology.slices) if across else None
    sent = collectives.communication(module, executions, dict(mesh.shape), slices)
    ops = operations.count(module, executions, caches=True)
    bound = roofline.bound(ops.flops, phase.reads, sent, topology, mesh, dtype)
    notes = [f"the compiler gave up: {found.overflow.splitlines()[0]}"] if found.overflow else []
    if ops.silent_kernels:
        notes.append(f"kernels without a declared cost: {', '.join(ops.silent_kernels)}")
    return Stock(
        name=phase.name,
        calls=phase.calls,
        held=phase.held,
        beside=phase.beside,
        memory=found.memory_bytes,
        flops=ops.flops,
        traffic=ops.traffic,
        compute_s=bound.compute,
        memory_s=bound.memory,
        network_s=bound.network,
        bound_s=bound.step,
        bound_by=bound.by,
        compile_cpu_s=found.compile_seconds,
        notes=notes,
    )


def whole_step(step_s: float, phases: Sequence[Stock]) -> float:
    """Seconds of a step with what runs between steps, and what runs beside them."""
    between = step_s + sum(p.seconds for p in phases if not p.beside)
    return max(between, sum(p.seconds for p in phases if p.beside))
