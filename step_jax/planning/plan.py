"""A plan: what a pretraining recipe needs of a pod, from the program that the pod would run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.spec import count
from step_jax.models.flops import train_flops_per_token
from step_jax.planning import collectives, estimate, hlo, memory, operations, roofline
from step_jax.planning.program import Program, compile_program, parsed, resolved
from step_jax.planning.topology import Topology, crosses_slices
from step_jax.trainers.pretrain import PretrainConfig

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Plan:
    """Everything that ``step-jax plan`` says; figures are of one device unless named otherwise.

    Attributes:
      recipe, topology: names.
      devices, chips: a TPU7x chip is two devices.
      mesh: axis -> size, those of size 1 left out.
      rows, sequence, accumulation, remat: of a step.
      parameters, active: of the whole model; those that a token uses.
      memory: class -> bytes at the fullest moment.
      memory_total, memory_compiler, memory_limit: sum of ``memory``, what the compiler reserves,
        what the device has (None on a CPU).
      memory_arguments: the part of it that the step is given: state and batch.
      memory_estimate: class -> bytes as expected before compiling.
      buffers: the largest of them: bytes, shape, source, class.
      flops, flops_model: operations of the compiled program; those that the model needs.
      kernels_without_cost: kernels whose operations the compiler's text does not tell.
      traffic: bytes to and from main memory.
      collectives: kind, axes, calls, bytes sent.
      compute_s, memory_s, network_s: see ``roofline.Bound``.
      step_s, serial_s, bound_by: the same.
      mfu_bound: the model's operations at ``step_s`` over the peak.
      pipeline_microbatches, bubble: of a pipeline, and the share of its steps that a device spends
        on padding. The padding is computed, so ``flops``, ``step_s`` and ``mfu_bound`` include it.
      expert_bubble: share of a step that other devices would wait for a shard of experts whose
        buffers are full, were ``compute_s`` the bound. The figures are those of an even load.
      steps, tokens, tokens_per_day, days, chip_hours: of the recipe's whole run at ``step_s``.
      compile_cpu_s: CPU seconds of the compilation.
      notes: what to know about the figures.
    """

    recipe: str
    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    rows: int
    sequence: int
    accumulation: int
    remat: str
    parameters: int
    active: int
    memory: dict[str, float]
    memory_total: float
    memory_compiler: float
    memory_arguments: float
    memory_limit: float | None
    memory_estimate: dict[str, float]
    buffers: list[dict[str, Any]]
    flops: float
    flops_model: float
    kernels_without_cost: list[str]
    traffic: float
    collectives: list[dict[str, Any]]
    compute_s: float
    memory_s: float
    network_s: dict[str, float]
    step_s: float
    serial_s: float
    bound_by: str
    mfu_bound: float
    pipeline_microbatches: int
    bubble: float
    expert_bubble: float
    steps: int
    tokens: float
    tokens_per_day: float
    days: float
    chip_hours: float
    compile_cpu_s: float
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory_limit is None or self.memory_compiler <= self.memory_limit

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def make_plan(config: PretrainConfig, topology: Topology, recipe: str = "") -> Plan:
    """Compiles a recipe's train step for a topology and takes stock of it.

    Raises:
      ConfigError: a recipe that does not fit the topology's number of devices, or the mesh.
    """
    config = resolved(config, topology.count)
    return take_stock(config, topology, compile_program(config, topology), recipe)


def take_stock(
    config: PretrainConfig, topology: Topology, program: Program, recipe: str = ""
) -> Plan:
    """The plan of a compiled program; ``config`` as ``resolved``."""
    module = parsed(program)
    executions, endless = hlo.executions(module)
    mesh = program.sharding.mesh
    ops = operations.count(module, executions)
    across = next((a for a in mesh.axis_names if crosses_slices(mesh, [a])), None)
    slices = (across, topology.slices) if across else None
    sent = collectives.communication(module, executions, dict(mesh.shape), slices)
    used = memory.analyse(
        module,
        program.assignment,
        program.live_range,
        program.local_parameter_shapes,
        program.code_bytes,
        program.memory_bytes,
    )
    bound = roofline.bound(ops, sent, topology, mesh, config.execution.dtype)
    pieces, bubble = estimate.bubble(config, program.sharding, program.rows)
    excess = estimate.expert_excess(config, program.sharding, program.rows)
    return Plan(
        recipe=recipe,
        topology=topology.name,
        devices=topology.count,
        chips=topology.chips,
        mesh={a: n for a, n in mesh.shape.items() if n > 1},
        remat=config.execution.remat,
        memory=used.classes,
        memory_total=used.total,
        memory_compiler=used.compiler,
        memory_arguments=used.arguments,
        memory_limit=topology.chip.hbm_bytes if topology.chip else None,
        memory_estimate=estimate.memory(config, program.sharding, program.rows),
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
        pipeline_microbatches=pieces,
        bubble=bubble,
        expert_bubble=excess / (ops.flops + excess),
        compile_cpu_s=program.compile_seconds,
        notes=_notes(program, ops, endless),
        **_run(config, topology, program.rows, bound.step),
    )


def _run(config: PretrainConfig, topology: Topology, rows: int, step_s: float) -> dict[str, Any]:
    """The fields that follow from a step's time and the recipe's length."""
    specs, T = config.model.specs(), config.data.sequence_length
    tokens_per_step = rows * T
    steps = config.training.total_steps(tokens_per_step)
    model_flops = tokens_per_step * train_flops_per_token(config.model, T) / topology.count
    days = steps * step_s / SECONDS_PER_DAY
    return dict(
        rows=rows,
        sequence=T,
        accumulation=config.training.accumulation,
        parameters=count(specs),
        active=count(specs, active=True),
        flops_model=model_flops,
        mfu_bound=model_flops / (step_s * roofline.peak(topology, config.execution.dtype)),
        steps=steps,
        tokens=float(steps * tokens_per_step),
        tokens_per_day=tokens_per_step * SECONDS_PER_DAY / step_s,
        days=days,
        chip_hours=days * 24 * topology.chips,
    )


def _notes(program: Program, ops, endless: list[str]) -> list[str]:
    notes = []
    if program.overflow:
        notes.append(f"the compiler gave up: {program.overflow.splitlines()[0]}")
    if endless:
        notes.append(f"loops of unknown length, counted once: {', '.join(endless)}")
    if ops.silent_kernels:
        notes.append(
            "kernels that declare no cost, whose operations are missing in the compiled count: "
            + ", ".join(ops.silent_kernels)
        )
    return notes


def advice(classes: dict[str, float], remat: str) -> list[str]:
    """What would help a step that needs too much memory, the strongest first.

    Args:
      classes: bytes of each of ``memory.CLASSES``.
      remat: policy of the step.
    """
    help_for = {
        "activations": [
            "execution.remat: full keeps only each layer's input",
            "training.accumulation: twice as many microbatches halve the activations",
            "parallel.context cuts the sequence",
        ],
        "temporaries": [
            "training.accumulation: smaller microbatches",
            "execution.loss_chunks: more pieces of the vocabulary projection",
            "parallel.tensor cuts heads, hidden units and vocabulary",
        ],
        "parameters": ["parallel.fsdp (or expert): more pieces", "more chips"],
        "optimizer": [
            "parallel.fsdp: more pieces",
            "optimizer.mu_dtype: bfloat16 halves the first moment",
        ],
        "gradients": ["parallel.fsdp: more pieces", "more chips"],
    }
    largest = sorted(classes, key=lambda k: -classes[k])
    lines = [line for kind in largest[:2] for line in help_for.get(kind, [])]
    done = {"full": "execution.remat: full keeps"}.get(remat, "\0")
    return [line for line in lines if not line.startswith(done)]
