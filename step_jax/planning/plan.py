"""A plan: what a recipe needs of a pod, from the program that the pod would run."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.spec import count, trained
from step_jax.planning import collectives, estimate, hlo, memory, operations, roofline
from step_jax.planning.compiled import (
    Compiled,
    Loop,
    compile_step,
    execution_of,
    extent,
    parsed,
    program_for,
    resolved,
)
from step_jax.planning.topology import Topology, crosses_slices
from step_jax.training.program import Program

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Plan:
    """Everything that ``step-jax plan`` says; figures are of one device unless named otherwise.

    None is what does not exist for a loop; it is shown nowhere.

    Attributes:
      recipe, topology: names.
      devices, chips: a TPU7x chip is two devices.
      mesh: axis -> size, those of size 1 left out.
      work, unit: what a step does: so many tokens, images, ...
      rows, sequence, accumulation, remat: of a step.
      parameters, active, trained: of all models; those that a token uses; those that learn.
      memory: class -> bytes at the fullest moment.
      memory_total, memory_compiler, memory_limit: sum of ``memory``, what the compiler reserves,
        what the device has (None on a CPU).
      memory_arguments: the part of it that the step is given: state and batch.
      memory_estimate: class -> bytes as expected before compiling, of a decoder.
      buffers: the largest of them: bytes, shape, source, class.
      flops, flops_model: operations of the compiled program; those that the models need.
      kernels_without_cost: kernels whose operations the compiler's text does not tell.
      traffic: bytes to and from main memory.
      collectives: kind, axes, calls, bytes sent.
      compute_s, memory_s, network_s: see ``roofline.Bound``.
      step_s, serial_s, bound_by: the same.
      mfu_bound: the models' operations at ``step_s`` over the peak.
      pipeline_microbatches, bubble: of a pipeline, and the share of its steps that a device spends
        on padding. The padding is computed, so ``flops``, ``step_s`` and ``mfu_bound`` include it.
      expert_bubble: share of a step that other devices would wait for a shard of experts whose
        buffers are full, were ``compute_s`` the bound. The figures are those of an even load.
      steps, work_total, work_per_day, days, chip_hours: of the recipe's whole run at ``step_s``.
      compile_cpu_s: CPU seconds of the compilation.
      advice: what would lower the memory of the largest classes, the strongest first.
      notes: what to know about the figures.
    """

    recipe: str
    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    work: int
    unit: str
    rows: int | None
    sequence: int | None
    accumulation: int
    remat: str | None
    parameters: int
    active: int
    trained: int
    memory: dict[str, float]
    memory_total: float
    memory_compiler: float
    memory_arguments: float
    memory_limit: float | None
    memory_estimate: dict[str, float] | None
    buffers: list[dict[str, Any]]
    flops: float
    flops_model: float | None
    kernels_without_cost: list[str]
    traffic: float
    collectives: list[dict[str, Any]]
    compute_s: float
    memory_s: float
    network_s: dict[str, float]
    step_s: float
    serial_s: float
    bound_by: str
    mfu_bound: float | None
    pipeline_microbatches: int
    bubble: float
    expert_bubble: float | None
    steps: int
    work_total: float
    work_per_day: float
    days: float
    chip_hours: float
    compile_cpu_s: float
    advice: list[str]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory_limit is None or self.memory_compiler <= self.memory_limit

    def save(self, path: Path) -> None:
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def make_plan(loop: Loop, config: Any, topology: Topology, recipe: str = "") -> Plan:
    """Compiles the train step of a loop's configuration for a topology and takes stock of it.

    Raises:
      ConfigError: a recipe that does not fit the topology's number of devices, or the mesh.
    """
    config = resolved(config, topology.count)
    compiled = compile_step(program_for(loop, config, topology), topology)
    return take_stock(config, topology, compiled, recipe)


def take_stock(config: Any, topology: Topology, compiled: Compiled, recipe: str = "") -> Plan:
    """The plan of a compiled step; ``config`` as ``resolved``."""
    program, module = compiled.program, parsed(compiled)
    executions, endless = hlo.executions(module)
    mesh = program.sharding.mesh
    ops = operations.count(module, executions)
    across = next((a for a in mesh.axis_names if crosses_slices(mesh, [a])), None)
    slices = (across, topology.slices) if across else None
    sent = collectives.communication(module, executions, dict(mesh.shape), slices)
    used = memory.analyse(
        module,
        compiled.assignment,
        compiled.live_range,
        compiled.local_parameter_shapes,
        compiled.code_bytes,
        compiled.memory_bytes,
    )
    bound = roofline.bound(ops, sent, topology, mesh, program.work.dtype)
    execution = execution_of(config)
    return Plan(
        recipe=recipe,
        topology=topology.name,
        devices=topology.count,
        chips=topology.chips,
        mesh={a: n for a, n in mesh.shape.items() if n > 1},
        remat=execution.remat if execution else None,
        memory=used.classes,
        memory_total=used.total,
        memory_compiler=used.compiler,
        memory_arguments=used.arguments,
        memory_limit=topology.chip.hbm_bytes if topology.chip else None,
        buffers=[dataclasses.asdict(b) for b in used.buffers[:10]],
        flops=ops.flops,
        kernels_without_cost=list(ops.silent_kernels),
        traffic=ops.traffic,
        collectives=[dataclasses.asdict(c) for c in sent],
        compute_s=bound.compute,
        memory_s=bound.memory,
        network_s=bound.network,
        step_s=bound.step,
        serial_s=bound.serial,
        bound_by=bound.by,
        compile_cpu_s=compiled.compile_seconds,
        advice=advice(used.classes, config, extent(program.schema)[1]),
        notes=[*program.notes, *_notes(compiled, ops, endless)],
        **_expected(config, program, ops.flops),
        **_run(program, topology, bound.step),
    )


def _expected(config: Any, program: Program, flops: float) -> dict[str, Any]:
    """The fields that are known without compiling; some of them only for decoders."""
    rows, sequence = extent(program.schema)
    pieces, bubble = estimate.bubble(rows, program.accumulation, program.sharding)
    case = estimate.case_of(program, execution_of(config))
    excess = None if case is None else estimate.expert_excess(case)
    return dict(
        rows=rows,
        sequence=sequence,
        accumulation=program.accumulation,
        memory_estimate=None if case is None else estimate.memory(case),
        pipeline_microbatches=pieces,
        bubble=bubble,
        expert_bubble=None if excess is None else excess / (flops + excess),
    )


def _run(program: Program, topology: Topology, step_s: float) -> dict[str, Any]:
    """The fields that follow from a step's time and the run's length."""
    work, steps = program.work, program.total_steps
    needed = work.flops / topology.count or None  # 0 says that nobody counts them
    days = steps * step_s / SECONDS_PER_DAY
    tables = [how.model_specs for how in program.learnings.values()]
    return dict(
        work=work.count,
        unit=work.unit,
        parameters=sum(count(specs) for specs in tables),
        active=sum(count(specs, active=True) for specs in tables),
        trained=sum(count(trained(how.specs)) for how in program.learnings.values()),
        flops_model=needed,
        mfu_bound=needed and needed / (step_s * roofline.peak(topology, work.dtype)),
        steps=steps,
        work_total=float(steps * work.count),
        work_per_day=work.count * SECONDS_PER_DAY / step_s,
        days=days,
        chip_hours=days * 24 * topology.chips,
    )


def _notes(compiled: Compiled, ops, endless: list[str]) -> list[str]:
    notes = []
    if compiled.overflow:
        notes.append(f"the compiler gave up: {compiled.overflow.splitlines()[0]}")
    if endless:
        notes.append(f"loops of unknown length, counted once: {', '.join(endless)}")
    if ops.silent_kernels:
        notes.append(
            "kernels that declare no cost, whose operations are missing in the compiled count: "
            + ", ".join(ops.silent_kernels)
        )
    return notes


#: Class of memory -> (settings, what they do), the strongest first.
_HELP: dict[str, tuple[tuple[str, str], ...]] = {
    "activations": (
        ("execution.remat", ": full keeps only each layer's input"),
        ("training.accumulation", ": twice as many microbatches halve the activations"),
        ("parallel.context", " cuts the sequence"),
    ),
    "temporaries": (
        ("training.accumulation", ": smaller microbatches"),
        ("execution.loss_chunks", ": more pieces of the vocabulary projection"),
        ("parallel.tensor", " cuts heads, hidden units and vocabulary"),
    ),
    "parameters": (("parallel.fsdp", " (or expert): more pieces"), ("", "more chips")),
    "optimizer": (
        ("parallel.fsdp", ": more pieces"),
        ("optimizer.mu_dtype", ": bfloat16 halves the first moment"),
    ),
    "gradients": (("parallel.fsdp", ": more pieces"), ("", "more chips")),
}


_OF_SEQUENCES = ("parallel.context", "execution.loss_chunks")


def advice(classes: dict[str, float], config: Any, sequence: int | None) -> list[str]:
    """What would help a step that needs too much memory, the strongest first.

    Args:
      classes: bytes of each of ``memory.CLASSES``.
      config: the step's; only settings that it has are named, and none that does all it can.
      sequence: length of the texts, None without any.
    """

    def applies(setting: str) -> bool:
        keys = setting.split(".")
        value = functools.reduce(lambda group, key: getattr(group, key, None), keys, config)
        return value not in (None, "full", "bfloat16") and (
            sequence is not None or setting not in _OF_SEQUENCES
        )

    largest = sorted(classes, key=lambda k: -classes[k])[:2]
    helps = [line for kind in largest for line in _HELP.get(kind, ())]
    return [setting + effect for setting, effect in helps if not setting or applies(setting)]
