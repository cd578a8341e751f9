"""Proposals: meshes, remat policies and microbatches for a recipe on a topology, best first."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import AXES, MeshConfig, Sharding
from step_jax.data.batches import abstract_batch
from step_jax.models.context import Execution, RematPolicy
from step_jax.models.text.decoder import Decoder
from step_jax.planning import estimate, forecast, roofline
from step_jax.planning.case import Case, Held, case_of, held_bytes
from step_jax.planning.compiled import Loop, check_rows, execution_of, extent
from step_jax.planning.layers import PRODUCTS
from step_jax.planning.plan import NO_REQUEST, SECONDS_PER_DAY, Plan, Request, make_plan, versions
from step_jax.planning.topology import Topology, paper_devices
from step_jax.runs.console import Console, duration, si
from step_jax.training.program import Program

COMPILED = 2  # of the best few
SHOWN = 8
#: Of the memory that the estimate may fill: it does not know every temporary.
MARGIN = 0.9
_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 4, 8, 16)
_MICROBATCHES = 64  # of a batch, at most
_REMAT: tuple[RematPolicy, ...] = ("none", "dots", "full")
#: Shorter pieces of a sequence are not worth the gathering of keys and values.
_SHORTEST_PIECE = 2048


@dataclass(frozen=True)
class Proposal:
    """A variant of the recipe, with its estimates and, for the best few, its plan.

    Attributes:
      flags: what to write after the recipe to get this variant, "" for the recipe itself.
      nbytes: of a device; see ``estimate.memory``.
      bound_s, step_s: of a step; what no step can beat, and its forecast (the bound without one).
      low_s, high_s: the forecast's range.
      mfu: the model's operations at ``step_s`` over the peak.
      rate: tokens per second and chip.
      days: of the recipe's whole run.
    """

    config: Any
    flags: str
    nbytes: float
    bound_s: float
    step_s: float
    low_s: float
    high_s: float
    mfu: float
    rate: float
    days: float
    plan: Plan | None = None

    @property
    def fits(self) -> bool | None:
        """The compiler's word, None before it was asked."""
        return None if self.plan is None else self.plan.fits


def variants(
    config: Any, case: Case, topology: Topology, rows: Rows | None = None
) -> Iterator[Any]:
    """Every variant that is considered, whether or not its sizes divide.

    Args:
      case: of the recipe as it stands, on any mesh.
      rows: parallel -> rows of a batch that a device of such a mesh has, or None if it has no
        whole number of them; every divisor is a number of microbatches. Without it the recipe's
        own number of microbatches is the only one.
    """
    own = _accumulation(config)
    for parallel in _meshes(config.parallel, case, topology):
        for remat, accumulation in itertools.product(_REMAT, _counts(own, parallel, rows)):
            variant = replace(config, parallel=parallel, execution=with_remat(config, remat))
            yield variant if accumulation is None else with_accumulation(variant, accumulation)


def with_remat(config: Any, remat: RematPolicy) -> Execution:
    """The execution with another policy, and without names where nothing would read them."""
    named = config.execution if remat == "full" else Execution()
    return replace(config.execution, remat=remat, keep=named.keep, offload=named.offload)


Rows = Callable[[MeshConfig], int | None]


def _counts(own: int | None, parallel: MeshConfig, rows: Rows | None) -> list[int | None]:
    """Microbatches to try on a mesh; None for a loop that takes its batch at once."""
    if own is None or rows is None:
        return [own]
    local = rows(parallel)
    return [] if local is None else [n for n in _divisors(local) if n <= _MICROBATCHES]


def _accumulation(config: Any) -> int | None:
    """None for a loop that always takes its batch at once."""
    return getattr(getattr(config, "training", None), "accumulation", None)


def with_accumulation(config: Any, count: int) -> Any:
    """A configuration with so many microbatches; itself for a loop without any."""
    if _accumulation(config) is None:
        return config
    return replace(config, training=replace(config.training, accumulation=count))


def _meshes(recipe: MeshConfig, case: Case, topology: Topology) -> Iterator[MeshConfig]:
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
    pairs += [
        (f"execution.{name}", getattr(variant.execution, name), getattr(recipe.execution, name))
        for name in ("remat", "keep", "offload")
    ]
    pairs.append(("training.accumulation", _accumulation(variant), _accumulation(recipe)))
    changed = ((name, "[]" if new == () else new) for name, new, old in pairs if new != old)
    return " ".join(f"--{name} {new}" for name, new in changed)


class Estimator:
    """Estimates variants of one recipe; what depends on less than all of it is made once for each.

    Of a program only the batch can depend on the mesh: on how many devices share its rows. So it is
    made for a mesh of so many, on paper, and its state is laid out on the variant's own.
    """

    def __init__(self, loop: Loop, config: Any, topology: Topology):
        self.loop, self.recipe, self.topology = loop, config, topology
        self._layout = functools.cache(self._layout_of)
        #: the recipe's own, for one device
        self.own = self.program(config)
        self._programs: dict[tuple[int, int | None], Program | None] = {
            (1, _accumulation(config)): self.own
        }

    def program(self, config: Any, ways: int = 1) -> Program:
        """The program of a configuration for ``ways`` devices that share the rows."""
        parallel, kind = MeshConfig(data=ways), self.topology.devices[0]
        devices = paper_devices(kind.platform, kind.device_kind, ways)
        sharding = Sharding.build(parallel, devices)
        return self.loop.program(replace(config, parallel=parallel), sharding)

    def _known(self, variant: Any, ways: int) -> Program | None:
        """The program of a variant; one for all of them where the recipe fixes the batch."""
        count = _accumulation(variant)
        training = getattr(variant, "training", None)
        fixed = isinstance(getattr(training, "batch_size", None), int)
        key = (1, None) if fixed else (ways, count)
        if key not in self._programs:
            whole = with_accumulation(variant, 1) if fixed else variant
            try:
                self._programs[key] = self.program(whole, key[0])
            except ConfigError:  # a size that does not divide
                self._programs[key] = None
        program = self._programs[key]
        return program and replace(program, accumulation=count or program.accumulation)

    def rows(self, parallel: MeshConfig) -> int | None:
        """Rows of a batch that a device of a mesh has, None if it cannot be laid out."""
        layout = self._layout(parallel)
        if layout is None:
            return None
        ways = layout[0].ways("batch")
        program = self._known(with_accumulation(self.recipe, 1), ways)
        total = None if program is None else extent(program.schema)[0]
        return None if not total or total % ways else total // ways

    def _layout_of(self, parallel: MeshConfig) -> tuple[Sharding, Held] | None:
        """A mesh, and what the state takes of a device; None if a size does not divide."""
        try:
            sharding = Sharding.build(parallel, self.topology.devices)
            return sharding, held_bytes(self.own, sharding)
        except ConfigError:
            return None

    def __call__(self, variant: Any) -> Proposal | None:
        """The variant with its estimates, None if it cannot be laid out."""
        layout = self._layout(variant.parallel)
        if layout is None:
            return None
        sharding, held = layout
        program = self._known(variant, sharding.ways("batch"))
        if program is None:
            return None
        try:
            check_rows(program.schema, sharding, program.accumulation)
            abstract_batch(sharding, program.schema)
            case = case_of(program, variant.execution, sharding, held)
            assert case is not None, "search() refuses what has no estimates"
            flags = _flags(variant, self.recipe)
            return _proposal(variant, flags, case, self.topology, program.total_steps)
        except ConfigError:  # a size that does not divide
            return None


def _proposal(variant: Any, flags: str, case: Case, topology: Topology, steps: int) -> Proposal:
    dtype, mesh = case.execution.dtype, case.sharding.mesh
    work = estimate.work(case)
    flops = sum(amount for (_, kind), amount in work.items() if kind in PRODUCTS)
    sent = estimate.sent(case, topology)
    host_bytes = estimate.host_bytes(case)
    bound = roofline.bound(flops, case.held.touched, sent, topology, mesh, dtype, host_bytes)
    expected = forecast.forecast(work, bound.network, topology, dtype, bound.step)
    step_s = bound.step if expected is None else expected.step
    needed = case.tokens * estimate.train_flops(case.model, case.sequence)
    return Proposal(
        config=variant,
        flags=flags,
        nbytes=sum(estimate.memory(case).values()),
        bound_s=bound.step,
        step_s=step_s,
        low_s=step_s if expected is None else expected.low,
        high_s=step_s if expected is None else expected.high,
        mfu=needed / (step_s * roofline.peak(topology, dtype) * topology.count),
        rate=case.tokens / step_s / topology.chips,
        days=steps * step_s / SECONDS_PER_DAY,
    )


def search(
    loop: Loop,
    config: Any,
    topology: Topology,
    request: Request = NO_REQUEST,
    compiled: bool = True,
) -> list[Proposal]:
    """The best proposals, those that fit first, then by time; the first few compiled.

    The recipe as it stands comes last if it can be laid out and is none of them.

    Raises:
      ConfigError: no estimates for what the loop trains, or no variant at all can be laid out on
        the topology.
    """
    estimated = Estimator(loop, config, topology)
    case = case_of(estimated.own, execution_of(config))
    if case is None:
        kinds = ", ".join(f"{n} ({m.kind})" for n, m in estimated.own.models.items())
        raise ConfigError(
            f"only a single decoder of texts can be estimated before it is compiled; this loop "
            f"trains {kinds}: give a mesh, and a topology that can be compiled for, without "
            "--search"
        )
    tried = variants(config, case, topology, estimated.rows)
    found = [p for p in map(estimated, tried) if p is not None]
    if not found:
        raise ConfigError(f"no mesh of {topology.name} divides this model and its batch")
    most = limit(topology)
    found.sort(key=lambda p: (p.nbytes > most, p.step_s if p.nbytes <= most else p.nbytes))
    best = found[:SHOWN]
    if compiled and not topology.on_paper:
        plans = [(_compiled(loop, p, topology, request), p) for p in best[:COMPILED]]
        plans.sort(key=lambda pair: (not pair[0].fits, _seconds(pair[0])))
        best[:COMPILED] = [replace(p, plan=plan) for plan, p in plans]
    return best + _as_it_stands(estimated, best)


def limit(topology: Topology) -> float:
    """Bytes of a device that an estimate may fill."""
    return math.inf if topology.chip is None else MARGIN * topology.chip.hbm_bytes


def _compiled(loop: Loop, p: Proposal, topology: Topology, request: Request) -> Plan:
    flags = (*request.flags, *p.flags.split())
    return make_plan(loop, p.config, topology, replace(request, flags=flags))


def _seconds(plan: Plan) -> float:
    """The forecast of a plan, or its bound if it has none."""
    return plan.bound_s if plan.forecast is None else plan.forecast["step"]


def _as_it_stands(estimated: Estimator, best: list[Proposal]) -> list[Proposal]:
    recipe = estimated.recipe
    try:
        parallel = recipe.parallel.resolve(estimated.topology.count)
    except ConfigError:
        return []
    proposal = estimated(replace(recipe, parallel=parallel))
    if proposal is None or any(p.config == proposal.config for p in best):
        return []
    return [replace(proposal, flags="")]


def rows_of(
    proposals: list[Proposal], topology: Topology, request: Request
) -> list[dict[str, Any]]:
    """The proposals as rows of plain values, the best first."""
    hours = 24 * topology.chips
    return [
        {
            "rank": n,
            "flags": p.flags,
            "memory_estimate": p.nbytes,
            "memory_compiler": p.plan.memory_compiler if p.plan else None,
            "fits": p.fits,
            "bound_s": p.bound_s,
            "step_s": p.step_s,
            "low_s": p.low_s,
            "high_s": p.high_s,
            "step_s_compiled": p.plan and _seconds(p.plan),
            "mfu": p.mfu,
            "tokens_per_s_per_chip": p.rate,
            "days": p.days,
            "chip_hours": p.days * hours,
            "cost": request.price and p.days * hours * request.price,
        }
        for n, p in enumerate(proposals, 1)
    ]


def show(proposals: list[Proposal], topology: Topology, console: Console) -> None:
    """One line for each proposal."""
    rows = {}
    for n, p in enumerate(proposals, 1):
        text = f"{p.nbytes / 1e9:.3g} GB, {duration(p.step_s)} estimated"
        if topology.chip is not None:
            text += f" ({duration(p.low_s)} to {duration(p.high_s)}), MFU {p.mfu:.1%}"
            text += f", {p.days:.3g} days"
        if p.plan is not None:
            fits = "fits" if p.plan.fits else "does not fit"
            text += f"; compiled: {p.plan.memory_compiler / 1e9:.3g} GB ({fits}), "
            text += duration(_seconds(p.plan))
        rows[f"{n}. {p.flags or 'as it stands'}"] = text
    console.table(f"proposals for {topology.name}", rows)


def save(proposals: list[Proposal], topology: Topology, request: Request, path: Path) -> None:
    """Saves the ranking as JSON, and as Markdown beside it."""
    rows = rows_of(proposals, topology, request)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "recipe": request.recipe,
        "topology": topology.name,
        "flags": list(request.flags),
        "price": request.price,
        "currency": request.currency,
        "versions": versions(),
    }
    text = json.dumps(head | {"proposals": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(head, rows), encoding="utf-8")


def _markdown(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"# {head['recipe']} on {head['topology']}",
        "",
        "| | flags | GB of a device | step, s | range | MFU | tokens/s/chip | days | chip-hours "
        f"| cost{', ' + head['currency'] if head['currency'] else ''} | compiled |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = (
            ""
            if row["fits"] is None
            else (
                f"{row['memory_compiler'] / 1e9:.1f} GB, {row['step_s_compiled']:.3g} s"
                + ("" if row["fits"] else ", does not fit")
            )
        )
        lines.append(
            f"| {row['rank']} | {row['flags'] or 'as it stands'} "
            f"| {row['memory_estimate'] / 1e9:.1f} | {row['step_s']:.3g} "
            f"| {row['low_s']:.3g} to {row['high_s']:.3g} | {row['mfu']:.0%} "
            f"| {row['tokens_per_s_per_chip']:,.0f} | {row['days']:.3g} | {si(row['chip_hours'])} "
            f"| {si(row['cost']) if row['cost'] else ''} | {said} |"
        )
    return "\n".join(lines) + "\n"
