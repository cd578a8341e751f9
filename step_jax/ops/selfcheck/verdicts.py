"""Runs kernels on one device and compares them with their references.

A kernel that was proven in an interpreter can still be wrong on a chip: the compiler may be, or the
chip. So a process runs the kernels that it is about to use once, alone on one of its devices, at
the widths of its model and at lengths that no block divides. Memory is filled with NaN before each
run, so that a result that was not written, or is made of what lies beyond the arrays, shows.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu.chips import CHIPS
from pallas_kernels.tpu.poison import LANES, fill_vmem
from step_jax.ops import registry
from step_jax.ops.selfcheck.case import Case, bound, kernel_name


@dataclass(frozen=True)
class Verdict:
    """What came of one case.

    kernel, shapes: of the case, in words.
    error: of the worst row of ``worst``, relative to the row; NaN if it holds one.
    bound: that it may reach. worst: the result that comes nearest to its bound, or exceeds it.
    repeatable: whether a second run gave the same bits.
    seconds: of compiling and running.
    trouble: what was raised instead; "" if nothing was.
    host: of the process that it is of.
    """

    kernel: str
    shapes: str
    error: float
    bound: float
    worst: str
    repeatable: bool
    seconds: float
    trouble: str = ""
    host: int = 0

    @property
    def passed(self) -> bool:
        return not self.trouble and self.repeatable and self.error <= self.bound

    def fault(self) -> str:
        """What is wrong, in words; "" for a kernel that passed."""
        if self.passed:
            return ""
        if self.trouble:
            return f"it failed with {self.shapes}: {self.trouble}"
        if not self.error <= self.bound:
            found = "NaN" if math.isnan(self.error) else f"an error of {self.error:.2g}"
            return f"{self.worst} has {found} with {self.shapes} (at most {self.bound:.2g})"
        return f"two runs differ in their bits with {self.shapes}"


def _alone(device: jax.Device) -> NamedSharding:
    return NamedSharding(Mesh(np.array([device]), ("alone",)), PartitionSpec())


def inputs_like(case: Case) -> Any:
    """The inputs of a case as shapes and dtypes."""
    return jax.eval_shape(case.draw, jax.random.key(0))


def lowered(function: Callable, device: jax.Device, like: Sequence[Any]) -> jax.stages.Lowered:
    """The program of ``function`` for one device, which need not be here."""
    there = _alone(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tuple(like)
    )
    with jax.sharding.use_abstract_mesh(there.mesh.abstract_mesh):
        return jax.jit(function).lower(*arguments)


def compared(got: dict[str, Any], again: dict[str, Any], want: dict[str, Any]):
    """(result -> error of its worst row, whether both runs have the same bits)."""

    def norms(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) if x.ndim > 1 else jnp.square(x))

    def error(name: str):
        a, b = got[name].astype(jnp.float32), want[name].astype(jnp.float32)
        size = norms(b)
        # rows that should be zero are measured by what the others are
        return jnp.max(norms(a - b) / (size + jnp.sqrt(jnp.mean(jnp.square(size)))))

    def bits(x):
        return jax.lax.bitcast_convert_type(jnp.asarray(x), f"uint{8 * x.dtype.itemsize}")

    same = [jnp.all(bits(got[name]) == bits(again[name])) for name in want]
    return {name: error(name) for name in want}, jnp.all(jnp.stack(same))


def poison(device: jax.Device, like: dict[str, Any]) -> None:
    """Fills memory of the sizes of results with NaN and gives it back to the allocator; of a TPU
    the vector memory too, where kernels have their scratch."""
    nans = [
        jax.device_put(jnp.full(a.shape, jnp.nan, a.dtype), device)
        for _ in range(2)
        for a in like.values()
    ]
    for array in jax.block_until_ready(nans):
        array.delete()
    if (fill := _vmem_filler(device)) is not None:
        nan_1L = jax.device_put(np.full((1, LANES), np.nan, np.float32), _alone(device))
        jax.block_until_ready(fill(nan_1L))


@functools.cache
def _vmem_filler(device: jax.Device) -> jax.stages.Compiled | None:
    chip = registry.tpu_chip(device)
    if device.platform != "tpu" or chip not in CHIPS:
        return None
    fill = functools.partial(fill_vmem, chip=chip)
    return lowered(fill, device, [jax.ShapeDtypeStruct((1, LANES), jnp.float32)]).compile()


@dataclass(frozen=True)
class _Programs:
    """Of one case: shapes of the results; what draws the inputs, the kernel, and what compares two
    runs of it with the reference."""

    out: Any
    draw: Any
    kernel: Any
    compare: Any

    def compiled(self) -> _Programs:
        programs = (self.draw, self.kernel, self.compare)
        return _Programs(self.out, *(p.compile() for p in programs))


def _programs(case: Case, device: jax.Device) -> _Programs:
    def compare(inputs, got, again):
        return compared(got, again, case.reference()(*inputs))

    like = inputs_like(case)
    kernel = lowered(case.results(case.implementation, device), device, like)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _Programs(
        kernel.out_info,
        lowered(case.draw, device, (key,)),
        kernel,
        lowered(compare, device, (like, kernel.out_info, kernel.out_info)),
    )


def _attempt(function: Callable, *arguments: Any) -> tuple[Any, str, float]:
    """(the result or None, what was raised, seconds)."""
    start, result, trouble = time.perf_counter(), None, ""
    try:
        result = function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the verdict
        lines = str(error).strip().splitlines() or [""]
        trouble = f"{type(error).__name__}: {lines[0][:300]}"
    return result, trouble, time.perf_counter() - start


def _run(device: jax.Device, programs: _Programs) -> tuple[dict[str, float], bool]:
    """(result -> error, whether two runs have the same bits)."""
    inputs = programs.draw(jax.device_put(jax.random.key(0), _alone(device)))
    runs = []
    for _ in range(2):
        poison(device, programs.out)
        runs.append(jax.block_until_ready(programs.kernel(*inputs)))
    errors, same = jax.device_get(programs.compare(inputs, *runs))
    return {name: float(e) for name, e in errors.items()}, bool(same)


def judge(cases: Sequence[Case], device: jax.Device) -> list[Verdict]:
    """The verdict of every case, each run alone on ``device``, one of this process's.

    What a kernel raises, compiling included, is its verdict. Programs are compiled side by side.
    """
    made = [_attempt(_programs, case, device) for case in cases]
    with ThreadPoolExecutor() as pool:
        ready = list(pool.map(lambda m: _attempt(m[0].compiled) if m[0] else m, made))
    verdicts = []
    for case, (_, _, tracing), (programs, trouble, compiling) in zip(
        cases, made, ready, strict=True
    ):
        found, seconds = None, tracing + compiling
        if not trouble:
            found, trouble, running = _attempt(_run, device, programs)
            seconds += running
        verdicts.append(verdict(case, found, trouble, seconds))
    return verdicts


def verdict(case: Case, found, trouble: str, seconds: float) -> Verdict:
    errors, same = found or ({"": math.nan}, False)

    def badness(name: str) -> float:
        return math.inf if math.isnan(errors[name]) else errors[name] / bound(case.dtype, name)

    worst = max(errors, key=badness)
    return Verdict(
        kernel_name(case),
        case.shapes(),
        error=errors[worst],
        bound=bound(case.dtype, worst),
        worst=worst,
        repeatable=same,
        seconds=round(seconds, 3),
        trouble=trouble,
        host=jax.process_index(),
    )
