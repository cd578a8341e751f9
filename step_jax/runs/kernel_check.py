"""Kernels are checked before a run trusts them: once on every kind of chip, version and shape.

Every process runs the kernels that its model will be computed with, alone on one of its devices
(``ops.selfcheck``). What they find is joined: a kernel that is wrong on one host is used on none.
Verdicts are kept on disk, so that the next start costs nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jaxlib

import pallas_kernels
from step_jax import ops
from step_jax.core.digest import digest
from step_jax.core.distributed import Processes
from step_jax.core.errors import KernelError
from step_jax.core.files import cache_folder, seal, sealed
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import implementations
from step_jax.models.text.kernels import kernels_of
from step_jax.ops import registry
from step_jax.ops.selfcheck import Case, Verdict, judge
from step_jax.runs.console import duration

#: What a verdict is of, beside a chip, versions and a shape: the kernels and what calls them.
SOURCES = tuple(Path(package.__path__[0]) for package in (pallas_kernels, ops))
#: Variables that change what the compilers make.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
#: operation -> the setting of ``Execution`` that names its implementation
SETTINGS = {
    "attention": "attention",
    "decode attention": "attention",
    "grouped matmul": "grouped_matmul",
    "cross-entropy": "loss",
}

_instances = itertools.count()


def trusted(
    model: Decoder,
    execution: Execution,
    tokens: int,
    sharding: Sharding,
    report: Callable[[str], None],
    *,
    writes: bool = True,
) -> dict[str, str]:
    """``facts.implementations``, of kernels that were checked; all processes call it together.

    What ``auto`` chose and is wrong is passed over from here on, in everything that this process
    traces, and ``report`` is told.

    Args:
      writes: the run decodes text as well.

    Raises:
      ConfigError: an implementation that was named cannot be had on these devices.
      KernelError: a kernel that was named is wrong on one of the hosts.
    """
    registry.distrust({})  # kernels are asked about anew
    cases = kernels_of(model, execution, tokens, sharding, writes=writes)
    if not cases:
        return implementations(model, execution, tokens, sharding)
    start = time.perf_counter()
    verdicts, made = check(cases)
    wrong = [(c, v) for c, v in zip(cases, verdicts, strict=True) if not v.passed]
    _refuse_named(wrong, execution)
    kind = jax.local_devices()[0].device_kind
    reasons = {(c.operation.name, c.implementation, kind): v.fault() for c, v in wrong}
    registry.distrust({key: f"it failed its check, {fault}" for key, fault in reasons.items()})
    for (operation, name, _), fault in reasons.items():
        report(
            f"KERNEL NOT TRUSTED: {operation} {name}: {fault}; this run computes without it, on "
            "all hosts. `step-jax doctor RECIPE` checks again"
        )
    took = f"in {duration(time.perf_counter() - start)}" if made else "before"
    found = f"{len(reasons)} WRONG, see the log" if reasons else "right"
    chosen = implementations(model, execution, tokens, sharding)
    return chosen | {"kernels": f"{found}; {len(cases)} shapes checked {took}"}


def _refuse_named(wrong: Sequence[tuple[Case, Verdict]], execution: Execution) -> None:
    for case, verdict in wrong:
        setting = SETTINGS[case.operation.name]
        if getattr(execution, setting) != "auto":
            without = "xla" if setting == "attention" else case.operation.fallback
            raise KernelError(
                f"execution.{setting} names {case.implementation}, whose {case.operation.name} "
                f"kernel is wrong on host {verdict.host}: {verdict.fault()}. With "
                f"execution.{setting}: auto, or {without}, the run goes without "
                "it; `step-jax doctor RECIPE` checks again"
            )


def check(cases: Sequence[Case], *, fresh: bool = False) -> tuple[list[Verdict], int]:
    """(the worst verdict of all processes on each case, how many were made and not kept).

    Args:
      fresh: do not take verdicts that were kept.

    Raises:
      KernelError: processes that have other cases.
    """
    device = jax.local_devices()[0]

    def local():
        verdicts, made = kept_or_made(cases, device, fresh)
        return [asdict(verdict) for verdict in verdicts], made

    def lead(reports):
        return joined([found for found, _ in reports]), max(made for _, made in reports)

    processes = Processes(f"kernels/{next(_instances)}")
    found, made = processes.together("verdicts", local, lead)
    processes.forget("verdicts/reports")
    return [Verdict(**verdict) for verdict in found], made


def joined(reports: Sequence[Sequence[dict]]) -> list[dict]:
    """Of the verdicts of all hosts, those on each case in a list of their own, the worst ones."""
    of_cases = {tuple((v["kernel"], v["shapes"]) for v in report) for report in reports}
    if len(of_cases) > 1:
        raise KernelError(
            "the hosts check other kernels than each other: they have other configurations, "
            "versions or devices; `step-jax doctor RECIPE` on all of them says which"
        )

    def badness(verdict: dict) -> tuple[bool, float]:
        return not Verdict(**verdict).passed, verdict["seconds"]

    return [max(hosts, key=badness) for hosts in zip(*reports, strict=True)]


def kept_or_made(
    cases: Sequence[Case], device: jax.Device, fresh: bool = False
) -> tuple[list[Verdict], int]:
    """(this process's verdicts, how many of them were made now).

    What a kernel raised is not kept: a device's memory may have been taken.
    """
    files = {case: _file(case, device) for case in cases}
    kept = {} if fresh else {case: _read(file) for case, file in files.items()}
    new = [case for case in cases if kept.get(case) is None]
    made = dict(zip(new, judge(new, device) if new else (), strict=True))
    for case, verdict in made.items():
        if not verdict.trouble:
            _keep(files[case], verdict)
    found = kept | made
    here = jax.process_index()
    return [replace(v, host=here) for case in cases if (v := found[case]) is not None], len(new)


def _file(case: Case, device: jax.Device) -> Path:
    return cache_folder("kernels") / f"{identity(case, device)}.json"


def identity(case: Case, device: jax.Device) -> str:
    """Of everything that a verdict depends on."""
    sources = [
        (str(path.relative_to(root)), digest(path.read_bytes()))
        for root in SOURCES
        for path in sorted(root.rglob("*"))
        if path.suffix in (".py", ".json")
    ]
    return digest(
        repr(case),
        device.device_kind,
        [jax.__version__, jaxlib.__version__, device.client.platform_version],
        [os.environ.get(name, "") for name in _VARIABLES],
        sources,
    )


def _read(file: Path) -> Verdict | None:
    try:
        return Verdict(**sealed(file))
    except (OSError, ValueError, TypeError):
        return None


def _keep(file: Path, verdict: Verdict) -> None:
    try:
        seal(file, asdict(verdict))
    except OSError:
        pass  # a full or read-only disk: the next start checks again
