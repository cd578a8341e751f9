"""What a machine, or every host of a pod, makes of the kernels and links that a recipe will use.

Every process examines what it has alone; the reports are then compared. What is measured is
measured here: a CPU has no peak to share, and what an interpreter takes says nothing, so that such
figures are left out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from step_jax.core import hardware
from step_jax.core.config import config_hash
from step_jax.core.distributed import Processes
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import implementations
from step_jax.models.text.kernels import kernels_of
from step_jax.models.text.reward import RewardModel
from step_jax.ops import registry
from step_jax.ops.selfcheck import Attention, Case, CrossEntropy, Decode, GroupedMatmul
from step_jax.ops.selfcheck.verdicts import Verdict, inputs_like, lowered
from step_jax.planning.collective_check import Collective, check_collectives
from step_jax.planning.compiled import Loop, execution_of, extent
from step_jax.planning.contenders import contenders
from step_jax.planning.topology import Topology
from step_jax.runs.console import Console, duration, si
from step_jax.runs.device_memory import available
from step_jax.runs.kernel_check import kept_or_made

_PACKAGES = (
    *("step-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("nvidia-cuda-nvcc", "flax", "optax"),
)
#: Tokens of the rows that are timed, at most; rows checked on a CPU where XLA computes them.
_TIMED, _ON_CPU = 8192, 200
_REPEATS, _SAMPLE_SECONDS = 5, 0.05

_instances = itertools.count()


@dataclass(frozen=True)
class Speed:
    """Of one call, results and gradients.

    share: ``of`` the peak, or of the memory's bandwidth for what reads more than it computes; None
      where the chip is not known.
    trouble: what was raised.
    """

    name: str
    seconds: float | None
    share: float | None
    of: str
    trouble: str = ""


@dataclass(frozen=True)
class Kernel:
    """One kernel at one shape.

    verdict: of its check; None where it is only compiled. blocks: how it cuts the shape.
    timed: the shape of ``speeds``: its own and those of other implementations.
    compile_s, memory_bytes: of a program that is only compiled; what it takes beside its arguments.
    """

    name: str
    shapes: str
    verdict: Verdict | None = None
    blocks: str = ""
    timed: str = ""
    speeds: tuple[Speed, ...] = ()
    compile_s: float | None = None
    memory_bytes: int | None = None
    trouble: str = ""

    @property
    def fault(self) -> str:
        return self.trouble or (self.verdict.fault() if self.verdict else "")


@dataclass(frozen=True)
class Report:
    """Of one process.

    recipe, configuration: its name and hash. versions: package -> version. devices: what there is.
    chosen: operation -> implementation. failures: what is wrong, in words; of all hosts in the
    report that is shown.
    """

    recipe: str
    configuration: str
    versions: dict[str, str]
    devices: dict[str, str]
    chosen: dict[str, str] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    collectives: tuple[Collective, ...] = ()
    notes: tuple[str, ...] = ()
    hosts: int = 1
    failures: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON values; a number that is not finite is a text."""
        return json.loads(
            json.dumps(asdict(self) | {"passed": not self.failures}), parse_constant=str
        )


@dataclass(frozen=True)
class Subject:
    """What kernels are asked about: a decoder, how it is computed, tokens of a row, its mesh."""

    model: Decoder
    execution: Execution
    tokens: int
    sharding: Sharding


def subject_of(loop: Loop, config: Any, devices: Sequence[Any] | None = None) -> Subject | None:
    """Of a recipe; None for one without a decoder. ``devices``: None for all that there are.

    Raises:
      ConfigError: a recipe that does not fit the devices.
    """
    sharding = Sharding.build(config.parallel, devices)
    program, execution = loop.program(config, sharding), execution_of(config)
    decoders = (m.decoder if isinstance(m, RewardModel) else m for m in program.models.values())
    model = next((m for m in decoders if isinstance(m, Decoder)), None)
    tokens = extent(program.schema)[1]
    if model is None or execution is None or tokens is None:
        return None
    return Subject(model, execution, tokens, sharding)


def examine(recipe: str, config: Any, subject: Subject | None) -> Report:
    """What this host and all others find; every process calls it.

    The verdicts that it makes are kept, so that a run's start finds them.
    """
    report = _with_failures(_examined(recipe, config, subject))
    processes = Processes(f"doctor/{next(_instances)}")
    reports = processes.together("reports", report.plain, lambda reports: reports)
    return replace(report, hosts=len(reports), failures=tuple(_failures(reports)))


def _examined(recipe: str, config: Any, subject: Subject | None) -> Report:
    device = jax.local_devices()[0]
    registry.distrust({})
    kernels, chosen, notes = (), {}, []
    if subject is None:
        notes.append("no kernels: name a recipe that trains a decoder on texts")
    else:
        chosen = implementations(*_asked(subject))
        kernels = tuple(_kernels(subject, device))
    if device.platform == "cpu":
        notes.append(
            "a CPU: kernels run in an interpreter where they are named (`pallas_tpu_interpret`), "
            "whose time says nothing; devices are simulated, and so are their links"
        )
    return Report(
        recipe,
        "" if config is None else config_hash(config),
        versions(device),
        describe_devices(),
        chosen,
        kernels,
        tuple(check_collectives(jax.local_devices())),
        tuple(notes),
    )


def _asked(subject: Subject) -> tuple[Decoder, Execution, int, Sharding]:
    return subject.model, subject.execution, subject.tokens, subject.sharding


def _with_failures(report: Report) -> Report:
    wrong = [f"{k.name}: {k.fault}" for k in report.kernels if k.fault]
    links = (c for c in report.collectives if not c.right)
    wrong += [f"{c.name} over {c.devices} devices is wrong" for c in links]
    return replace(report, failures=tuple(wrong))


def _failures(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all hosts, and in what they differ from the first."""
    many = len(reports) > 1
    found = [
        (f"host {i}: " if many else "") + failure
        for i, report in enumerate(reports)
        for failure in report["failures"]
    ]
    for i, report in enumerate(reports[1:], 1):
        for name in ("configuration", "versions", "chosen"):
            first = reports[0][name]
            if report[name] != first:
                found.append(f"host {i} has another {name} than host 0: {report[name]}, {first}")
    return found


def versions(device: Any = None) -> dict[str, str]:
    """Python's, those of the packages that compile and compute, and of the device's runtime."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device is not None:
        found["runtime"] = " ".join(device.client.platform_version.split())
    return found


def describe_devices() -> dict[str, str]:
    """Number, kind, chip and memories, in words."""
    devices, local = jax.devices(), jax.local_devices()
    chip, memory = hardware.detect(local[0]), available(local[0])
    found = {"devices": f"{len(devices)} x {devices[0].device_kind}, {len(local)} of this host"}
    found["chip"] = "not in the table" if chip is None else chip.name
    if memory:
        found["memory of a device"] = f"{si(memory)}B"
    if chip is not None:
        found["on-chip memory"] = f"{si(chip.vmem_bytes)}B"
        found["peak (bf16)"] = f"{si(chip.bf16)}FLOP/s, {si(chip.hbm_bandwidth)}B/s"
    return found


# --- kernels --------------------------------------------------------------------------------------


def _kernels(subject: Subject, device: jax.Device):
    cases = kernels_of(*_asked(subject), left_to_xla=True)
    if device.platform == "cpu":
        cases = list(dict.fromkeys(map(_for_cpu, cases)))
    verdicts, _ = kept_or_made(cases, device, fresh=True)
    timed: set[Case] = set()
    for case, verdict in zip(cases, verdicts, strict=True):
        at_work = case.at_work(min(subject.tokens, _TIMED))
        kernel = Kernel(verdict.kernel, verdict.shapes, verdict, blocks(case, device))
        interpreted = case.implementation.endswith("_interpret")
        if device.platform != "cpu" and not interpreted and at_work not in timed:
            timed.add(at_work)
            speeds = tuple(_speeds(at_work, device))
            kernel = replace(kernel, timed=at_work.shapes(), speeds=speeds)
        yield kernel


def _for_cpu(case: Case) -> Case:
    """What XLA computes is looked at in small on a CPU, which takes minutes for what chips do."""
    if case.operation.implementations[case.implementation].kernel:
        return case
    if isinstance(case, Attention):
        window = case.window and min(case.window, _ON_CPU // 2)
        return replace(case, tokens=min(case.tokens, _ON_CPU), window=window)
    if isinstance(case, GroupedMatmul):
        return replace(case, groups=min(case.groups, 2))
    return case


def _speeds(case: Case, device: jax.Device):
    own = {case.implementation: case.results(case.implementation, device)}
    of = "memory's bandwidth" if case.traffic() else "peak"
    with jax.default_device(device):
        inputs = jax.jit(case.draw)(jax.random.key(0))
        for name, compute in (own | contenders(case, device)).items():
            try:
                seconds = _measured(jax.jit(compute), inputs)
            except Exception as error:  # noqa: BLE001 - one contender must not stop the others
                text = (str(error).strip().splitlines() or [""])[0][:200]
                yield Speed(name, None, None, of, f"{type(error).__name__}: {text}")
            else:
                yield Speed(name, seconds, _share(case, seconds, device), of)


def _measured(function: Callable, inputs: tuple) -> float:
    """Seconds of a call: the median of several samples of calls that last long enough."""
    jax.block_until_ready(function(*inputs))
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    calls = max(1, round(_SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*inputs)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def _share(case: Case, seconds: float, device: jax.Device) -> float | None:
    chip = hardware.detect(device)
    if chip is None:
        return None
    if case.traffic():
        return case.traffic() / seconds / chip.hbm_bandwidth
    return case.operations() / seconds / chip.peak(hardware.PRECISION[case.dtype])


def blocks(case: Case, device: Any) -> str:
    """How a kernel for TPUs cuts its arguments, in words; "" for others."""
    if not case.implementation.startswith("pallas_tpu"):
        return ""
    from pallas_kernels.tpu import block_sizes, decode, grouped_matmul

    chip, itemsize = registry.interpreted_chip(device), 2 if case.dtype == "bfloat16" else 4
    if isinstance(case, Attention):
        shape = block_sizes.Shape(
            *(case.heads // case.kv_heads, case.queries, case.tokens),
            *(case.width, case.value_width, itemsize),
        )
        forward, backward = block_sizes.fit(chip, shape)
        return (
            f"{forward.heads} x {forward.q_block} queries by {forward.kv_block} keys; backwards "
            f"{backward.heads} x {backward.q_block} by {backward.kv_block}"
        )
    if isinstance(case, GroupedMatmul):
        R, _, f, _ = grouped_matmul.blocks_of_rows(chip, 4096, case.width, case.result, itemsize)
        sizes = (chip, 4096, case.width, case.result, itemsize)
        _, d, g, _ = grouped_matmul.blocks_of_matrices(*sizes)
        return f"{R} rows by {f} columns; gradient of matrices {d} x {g}"
    if isinstance(case, Decode):
        cut = decode.tiling(case.slots, case.kv_heads, case.width, case.dtype)
        return f"{cut.block} slots a step, {cut.tile} a product"
    return ""


# --- without the chips ----------------------------------------------------------------------------


def compiled_for(recipe: str, config: Any, subject: Subject, topology: Topology) -> Report:
    """Every kernel of a recipe compiled for devices that are not here, at the awkward lengths and
    at the recipe's own.

    Raises:
      ConfigError: devices that nothing can be compiled for here.
    """
    if topology.platform != "tpu":
        raise ConfigError(f"nothing can be compiled for {topology.name} here: name a TPU topology")
    device = topology.devices[0]
    cases = kernels_of(*_asked(subject))
    own = [case.at_work(subject.tokens) for case in cases if not isinstance(case, CrossEntropy)]
    kernels = tuple(_compiled(case, device) for case in dict.fromkeys([*cases, *own]))
    assert topology.chip is not None
    notes = [] if kernels else ["no kernels: everything is left to XLA"]
    return _with_failures(
        Report(
            recipe,
            config_hash(config),
            versions(),
            {"topology": f"{topology.name}, {topology.count} devices", "chip": topology.chip.name},
            implementations(*_asked(subject)),
            kernels,
            notes=(*notes, "compiled, not run: only the chips can say whether results are right"),
        )
    )


def _compiled(case: Case, device: Any) -> Kernel:
    name, start = f"{case.operation.name} {case.implementation}", time.perf_counter()
    kernel = Kernel(name, case.shapes(), blocks=blocks(case, device))
    try:
        function = case.results(case.implementation, device)
        compiled = lowered(function, device, inputs_like(case)).compile()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is what is looked for
        text = (str(error).strip().splitlines() or [""])[0][:300]
        return replace(kernel, trouble=f"{case.shapes()}: {type(error).__name__}: {text}")
    memory = compiled.memory_analysis()
    return replace(
        kernel,
        compile_s=round(time.perf_counter() - start, 2),
        memory_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


# --- for people -----------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    console.table("versions", report.versions)
    console.table("devices", report.devices)
    if report.recipe:
        console.table("recipe", {"recipe": report.recipe, **report.chosen})
    for kernel in report.kernels:
        console.table(f"{kernel.name}: {kernel.shapes}", dict(_rows(kernel)))
    if report.collectives:
        console.table("collectives of this host", {c.name: _said(c) for c in report.collectives})
    if report.hosts > 1:
        console.line(f"{report.hosts} hosts were asked")
    for note in report.notes:
        console.line(note)
    for failure in report.failures:
        console.line(f"WRONG: {failure}")
    if not report.failures:
        console.line("nothing is wrong")


def _rows(kernel: Kernel):
    verdict = kernel.verdict
    if kernel.fault:
        yield "WRONG", kernel.fault
    elif verdict is not None:
        yield "compiles", f"and ran, with its check in {duration(verdict.seconds)}"
        yield "error", f"{verdict.error:.1e} of {verdict.worst} (at most {verdict.bound:.1e})"
        yield "repeatable", "the same bits twice"
    else:
        assert kernel.compile_s is not None
        memory = (
            "" if kernel.memory_bytes is None else f", {si(kernel.memory_bytes)}B of temporaries"
        )
        yield "compiles", f"in {duration(kernel.compile_s)}{memory}"
    if kernel.blocks:
        yield "blocks", kernel.blocks
    for speed in kernel.speeds:
        share = "" if speed.share is None else f", {speed.share:.0%} of the {speed.of}"
        took = "" if speed.seconds is None else f"{1e3 * speed.seconds:.3g} ms{share}"
        yield speed.name, f"{speed.trouble or took} ({kernel.timed})"


def _said(c: Collective) -> str:
    rate = "" if c.bytes_per_s is None else f", {si(c.bytes_per_s)}B/s sent by a device"
    return f"{'right' if c.right else 'WRONG'} over {c.devices} devices{rate}"
