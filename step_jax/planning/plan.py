"""A plan: what a recipe needs of a pod, from the program that the pod would run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.sharding import bytes_on_device
from step_jax.core.spec import count, trained
from step_jax.interop.artifacts import present
from step_jax.planning import (
    collectives,
    estimate,
    forecast,
    hlo,
    memory,
    operations,
    roofline,
)
from step_jax.planning.case import case_of, held_bytes
from step_jax.planning.cautions import cautions
from step_jax.planning.compiled import (
    Compiled,
    Loop,
    compile_step,
    execution_of,
    extent,
    parsed,
    phases_for,
    program_for,
    resolved,
)
from step_jax.planning.phases import Stock, whole_step
from step_jax.planning.phases import take_stock as take_stock_of_phase
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
        what it can have or, where it does not say, what the device has (None on a CPU).
      memory_beside: of a device, taken all the while by what is no argument of the step (a
        reference model).
      overflow: the compiler's words if it found no way to fit the step, else "".
      memory_arguments: the part of it that the step is given: state and batch.
      memory_host: bytes of the host's memory that the step takes for a device.
      memory_estimate: class -> bytes as expected before compiling, of a decoder.
      buffers: the largest of them: bytes, shape, source, class.
      flops, flops_model: operations of the compiled program; those that the models need.
      kernels_without_cost: kernels whose operations the compiler's text does not tell.
      traffic: bytes to and from main memory, if every instruction went through it: an estimate.
      to_host, from_host: bytes between main memory and the host's.
      layers: layer, kind of work, amount (operations or bytes), see ``layers``.
      collectives: kind, axes, devices of a group, calls, bytes sent.
      compute_s, memory_s, network_s, host_s: see ``roofline.Bound``.
      bound_s, bound_by: the same; no step is faster.
      mfu_bound: the models' operations at ``bound_s`` over the peak.
      forecast: step, low, high, layers, exposed, known: see ``forecast.Forecast``; None on a CPU.
      mfu: the models' operations at the forecast over the peak.
      rate: ``unit`` per second and chip at ``whole_s``.
      pipeline_microbatches, bubble: of a pipeline, and the share of its steps that a device spends
        on padding. The padding is computed, so ``flops`` and all times include it.
      expert_bubble: share of a step that other devices would wait for a shard of experts whose
        buffers are full, were ``compute_s`` the bound. The figures are those of an even load.
      phases: what runs between steps, or beside them, see ``phases.Stock``.
      whole_s: a step with its phases, at the forecast (or the bound without one) and their bounds.
      steps, work_total: of the recipe's whole run.
      work_per_day, days, chip_hours: at ``whole_s``; None for what does not fit.
      price, cost: of a chip-hour, and of the run, in ``currency``; None where none is given.
      compile_cpu_s: CPU seconds of the compilation.
      flags, versions: what was asked beside the recipe, and packages that the figures depend on.
      advice: what would lower the memory of the largest classes, the strongest first.
      changes: what other batches, lengths and ways to compute would make of it, see
        ``planning.changes``, which is who fills it.
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
    keep: list[str]
    offload: list[str]
    parameters: int
    active: int
    trained: int
    memory: dict[str, float]
    memory_total: float
    memory_compiler: float
    memory_arguments: float
    memory_host: float
    memory_limit: float | None
    memory_beside: int
    overflow: str
    memory_estimate: dict[str, float] | None
    buffers: list[dict[str, Any]]
    flops: float
    flops_model: float | None
    kernels_without_cost: list[str]
    traffic: float
    to_host: float
    from_host: float
    layers: list[dict[str, Any]]
    collectives: list[dict[str, Any]]
    compute_s: float
    memory_s: float
    network_s: dict[str, float]
    host_s: float
    bound_s: float
    bound_by: str
    mfu_bound: float | None
    forecast: dict[str, Any] | None
    mfu: float | None
    rate: float | None
    pipeline_microbatches: int
    bubble: float
    expert_bubble: float | None
    phases: list[dict[str, Any]]
    whole_s: float
    steps: int
    work_total: float
    work_per_day: float | None
    days: float | None
    chip_hours: float | None
    price: float | None
    cost: float | None
    currency: str | None
    compile_cpu_s: float
    flags: list[str]
    versions: dict[str, str]
    advice: list[str]
    changes: list[dict[str, Any]]
    notes: list[str]

    @property
    def misfit(self) -> str:
        """What does not fit, by the compiler's word: the step or a phase; "" if all do."""
        phases = [Stock(**p) for p in self.phases]
        own = self.overflow or too_much(self.memory_compiler, self.memory_beside, self.memory_limit)
        return own or next(filter(None, (p.misfit(self.memory_limit) for p in phases)), "")

    @property
    def fits(self) -> bool:
        return not self.misfit

    def save(self, path: Path) -> None:
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(known | {"fits": self.fits}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Request:
    """What a plan is made for beside a configuration and a topology.

    Attributes:
      recipe: its name.
      flags: that changed it.
      price, currency: of a chip-hour.
    """

    recipe: str = ""
    flags: tuple[str, ...] = ()
    price: float | None = None
    currency: str | None = None


NO_REQUEST = Request()


def make_plan(loop: Loop, config: Any, topology: Topology, request: Request = NO_REQUEST) -> Plan:
    """Compiles the train step of a loop's configuration for a topology and takes stock of it.

    Raises:
      ConfigError: a recipe that does not fit the topology's number of devices, or the mesh.
    """
    config = resolved(config, topology.count)
    program = program_for(loop, config, topology)
    compiled = compile_step(program, topology)
    phases = [
        take_stock_of_phase(phase, topology, program.work.dtype)
        for phase in phases_for(loop, config, topology)
    ]
    return take_stock(config, topology, compiled, request, phases)


def take_stock(
    config: Any,
    topology: Topology,
    compiled: Compiled,
    request: Request = NO_REQUEST,
    phases: Sequence[Stock] = (),
) -> Plan:
    """The plan of a compiled step; ``config`` as ``resolved``."""
    program, module = compiled.program, parsed(compiled)
    executions, endless = hlo.executions(module)
    mesh, dtype = program.sharding.mesh, program.work.dtype
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
    state_bytes = held_bytes(program, program.sharding).touched
    host_bytes = max(ops.to_host, ops.from_host)
    bound = roofline.bound(ops.flops, state_bytes, sent, topology, mesh, dtype, host_bytes)
    expected = forecast.forecast(ops.work, bound.network, topology, dtype, bound.step)
    execution = execution_of(config)
    return Plan(
        recipe=request.recipe,
        topology=topology.name,
        devices=topology.count,
        chips=topology.chips,
        mesh={a: n for a, n in mesh.shape.items() if n > 1},
        remat=execution.remat if execution else None,
        keep=list(execution.keep) if execution else [],
        offload=list(execution.offload) if execution else [],
        memory=used.classes,
        memory_total=used.total,
        memory_compiler=used.compiler,
        memory_arguments=used.arguments,
        memory_host=used.host,
        memory_limit=_limit(compiled, topology),
        memory_beside=bytes_on_device(program.beside),
        overflow=compiled.overflow.splitlines()[0] if compiled.overflow else "",
        buffers=[dataclasses.asdict(b) for b in used.buffers[:10]],
        flops=ops.flops,
        kernels_without_cost=list(ops.silent_kernels),
        traffic=ops.traffic,
        to_host=ops.to_host,
        from_host=ops.from_host,
        layers=[dict(layer=k[0], kind=k[1], amount=v) for k, v in sorted(ops.work.items())],
        collectives=[_said(c) for c in sent],
        compute_s=bound.compute,
        memory_s=bound.memory,
        network_s=bound.network,
        host_s=bound.host,
        bound_s=bound.step,
        bound_by=bound.by,
        compile_cpu_s=compiled.compile_seconds,
        flags=list(request.flags),
        versions=versions(),
        advice=advice(used.classes, config, extent(program.schema)[1]),
        changes=[],
        notes=[
            *program.notes,
            *not_there(config),
            *_notes(ops, endless, expected, topology),
            *_cautions(config, program, sent, topology),
        ],
        **_expected(config, program, ops.flops),
        **_run(program, topology, bound, expected, compiled, request, phases),
    )


def _limit(compiled: Compiled, topology: Topology) -> float | None:
    """Memory that the compiler said it has, or that the device has by its data sheet."""
    _, available, _ = memory.out_of_memory(compiled.overflow) or (None, None, [])
    return available or (topology.chip.hbm_bytes if topology.chip else None)


def _said(c: collectives.Traffic) -> dict[str, Any]:
    return dict(kind=c.kind, axes=c.axes, where=c.where, calls=c.calls, nbytes=c.nbytes)


def versions() -> dict[str, str]:
    """Of the packages that a plan's figures depend on, where they are installed."""
    found = {}
    for name in ("step-jax", "jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _expected(config: Any, program: Program, flops: float) -> dict[str, Any]:
    """The fields that are known without compiling; some of them only for decoders."""
    rows, sequence = extent(program.schema)
    pieces, bubble = estimate.bubble(rows, program.accumulation, program.sharding)
    case = case_of(program, execution_of(config))
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


def _run(
    program: Program,
    topology: Topology,
    bound: roofline.Bound,
    expected: forecast.Forecast | None,
    compiled: Compiled,
    request: Request,
    phases: Sequence[Stock],
) -> dict[str, Any]:
    """The fields that follow from a step's time and the run's length."""
    work, steps = program.work, program.total_steps
    needed = work.flops / topology.count or None  # 0 says that nobody counts them
    peak = roofline.peak(topology, work.dtype)
    step_s = whole_step(bound.step if expected is None else expected.step, phases)
    limit = _limit(compiled, topology)
    full = too_much(compiled.memory_bytes, bytes_on_device(program.beside), limit)
    fits = not (compiled.overflow or full or any(phase.misfit(limit) for phase in phases))
    days = steps * step_s / SECONDS_PER_DAY if fits else None
    hours = days and days * 24 * topology.chips
    tables = [how.model_specs for how in program.learnings.values()]
    return dict(
        work=work.count,
        unit=work.unit,
        parameters=sum(count(specs) for specs in tables),
        active=sum(count(specs, active=True) for specs in tables),
        trained=sum(count(trained(how.specs)) for how in program.learnings.values()),
        flops_model=needed,
        mfu_bound=needed and needed / (bound.step * peak),
        forecast=expected and dataclasses.asdict(expected),
        mfu=needed and expected and needed / (expected.step * peak),
        rate=expected and work.count / step_s / topology.chips,
        phases=[dataclasses.asdict(p) for p in phases],
        whole_s=step_s,
        steps=steps,
        work_total=float(steps * work.count),
        work_per_day=days and work.count * SECONDS_PER_DAY / step_s,
        days=days,
        chip_hours=hours,
        price=request.price,
        currency=request.currency,
        cost=hours and request.price and hours * request.price,
    )


def too_much(step: float | None, beside: float, limit: float | None) -> str:
    """Why a step has no room beside what lies there all the while; "" if it has, or if nothing
    does: then the compiler's word holds."""
    if step is None or limit is None or not beside or step + beside <= limit:
        return ""
    others = f"{beside / 1e9:.3g} GB that lie there all the while"
    return f"the step needs {step / 1e9:.3g} GB beside {others}, of {limit / 1e9:.3g} GB"


def not_there(config: Any) -> list[str]:
    """What a recipe starts from and is not here yet."""
    init = getattr(config, "init_from", None)
    if init is None or present(init.artifact):
        return []
    return [f"init_from {init.artifact} is not here: the model is taken to be the recipe's"]


def _notes(
    ops: operations.Operations,
    endless: list[str],
    expected: forecast.Forecast | None,
    topology: Topology,
) -> list[str]:
    notes = []
    if endless:
        notes.append(f"loops of unknown length, counted once: {', '.join(endless)}")
    if ops.silent_kernels:
        notes.append(
            "kernels that declare no cost, whose operations are missing in the compiled count: "
            + ", ".join(ops.silent_kernels)
        )
    if expected is not None and not expected.known:
        assert topology.chip is not None
        notes.append(
            f"no measured run on {topology.chip.name} was published: the forecast takes what other "
            "chips reach, and its range is twice as wide"
        )
    return notes


def _cautions(
    config: Any, program: Program, sent: Sequence[collectives.Traffic], topology: Topology
) -> list[str]:
    pretraining = getattr(config, "loop", None) == "pretrain"
    tokens = float(program.work.count * program.total_steps) if pretraining else None
    return cautions(case_of(program, execution_of(config)), topology.chip, sent, tokens)


#: Class of memory -> (settings, what they do), the strongest first.
_HELP: dict[str, tuple[tuple[str, str], ...]] = {
    "activations": (
        ("execution.remat", ": full keeps only each layer's input"),
        ("execution.offload", ": [layer] keeps each layer's input in the host's memory"),
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
        if setting == "execution.offload" and value is not None:
            return config.execution.remat == "full" and not value
        return value not in (None, "full", "bfloat16") and (
            sequence is not None or setting not in _OF_SEQUENCES
        )

    largest = sorted(classes, key=lambda k: -classes[k])[:2]
    helps = [line for kind in largest for line in _HELP.get(kind, ())]
    return [setting + effect for setting, effect in helps if not setting or applies(setting)]
