"""A plan in words and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step_jax.core.errors import StepError
from step_jax.core.sharding import Sharding
from step_jax.planning import estimate, hlo
from step_jax.planning.case import case_of
from step_jax.planning.compiled import Loop, execution_of
from step_jax.planning.memory import CLASSES, Buffer, largest, out_of_memory
from step_jax.planning.phases import Stock
from step_jax.planning.plan import Plan, advice
from step_jax.runs.console import Console, duration, si
from step_jax.runs.device_memory import DoesNotFit

#: Okabe-Ito, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999")
#: Of the layers of a forecast, the longest first: not the colours of memory.
_LAYERS = ("#08306B", "#2171B5", "#4292C6", "#6BAED6")
_INK, _MUTED = "#222222", "#6b7280"


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def title(plan: Plan) -> str:
    return f"{plan.recipe or 'recipe'} on {plan.topology}"


def verdict(plan: Plan) -> str:
    """The plan in a sentence."""
    if not plan.fits:
        return f"does not fit: {plan.misfit}"
    step = f"a step of at least {duration(plan.bound_s)}, bound by {plan.bound_by}"
    if plan.forecast is not None:
        f = plan.forecast
        step = f"a step of about {duration(f['step'])} ({duration(f['low'])} to "
        step += f"{duration(f['high'])}); none is below {duration(plan.bound_s)}"
    return f"fits, with {step}"


def tables(plan: Plan) -> list[tuple[str, dict[str, str]]]:
    """What there is to say of a plan: (title, rows)."""
    found = [
        (title(plan), _what(plan)),
        ("memory of a device at its fullest moment", _memory(plan)),
        ("operations and communication of a device and step", _work(plan)),
        ("the least time: what no step can beat", _bound(plan)),
    ]
    if plan.forecast is not None:
        found.append(("forecast: by what published runs reached of their chips", _forecast(plan)))
    if plan.phases:
        found.append(("a step, and what runs between steps at its bounds", _phases(plan)))
    found.append(("the run", _run(plan)))
    if plan.changes:
        found.append(("what would change it, all estimated before compiling", _changes(plan)))
    if not plan.fits:
        buffers = [Buffer(**b) for b in plan.buffers[:8]]
        found.append(("the largest buffers", _buffers(buffers)))
    return found


def show(plan: Plan, console: Console) -> None:
    """Prints the plan as tables; of one that does not fit what would help."""
    for name, rows in tables(plan):
        console.table(name, rows)
    for note in plan.notes:
        console.line(f"note: {note}")
    if not plan.fits:
        for line in plan.advice:
            console.line(f"would help: {line}")


def _buffers(buffers: list[Buffer]) -> dict[str, str]:
    return {
        f"{n}. {gigabytes(b.nbytes)}": f"{b.kind}: {b.shape.split('{')[0]} {b.source}"
        for n, b in enumerate(buffers, 1)
    }


def overflow(loop: Loop, config: Any, error: DoesNotFit) -> str:
    """The same for a step that was about to run on this process's devices, as text."""
    if error.program is None:
        _, _, buffers = out_of_memory(str(error)) or (None, None, [])
    else:
        buffers = largest(hlo.parse(error.program.as_text() or ""))
    lines = [str(error), *(f"  {n:<12} {text}" for n, text in _buffers(buffers).items())]
    lines += [f"would help: {line}" for line in _expected_advice(loop, config)]
    return "\n".join([*lines, "--force tries it all the same"])


def _expected_advice(loop: Loop, config: Any) -> list[str]:
    """What would help by the estimate; nothing for what has none."""
    try:
        program = loop.program(config, Sharding.build(config.parallel))
    except StepError:  # a run may know what no plan does: the tokenizer's vocabulary
        return []
    case = case_of(program, execution_of(config))
    return [] if case is None else advice(estimate.memory(case), config, case.sequence)


def _what(plan: Plan) -> dict[str, str]:
    mesh = " x ".join(f"{a}={n}" for a, n in plan.mesh.items()) or "1 device"
    active = f", {si(plan.active)} active" if plan.active != plan.parameters else ""
    trained = f", {si(plan.trained)} trained" if plan.trained != plan.parameters else ""
    rows = ""
    if plan.rows is not None and plan.sequence is not None:
        rows = f" ({plan.rows:,} rows of {plan.sequence:,})"
    remat = "" if plan.remat is None else f", remat {plan.remat}"
    remat += "".join(
        f", {word} {' '.join(names)}"
        for word, names in (("keep", plan.keep), ("offload", plan.offload))
        if names
    )
    return {
        "parameters": f"{si(plan.parameters)}{active}{trained}",
        "chips": f"{plan.chips:,} ({plan.devices:,} devices): {mesh}",
        "a step": f"{plan.work:,} {plan.unit}{rows}, accumulation {plan.accumulation}{remat}",
        "compiled in": f"{plan.compile_cpu_s:.0f} CPU-seconds",
    }


def _memory(plan: Plan) -> dict[str, str]:
    expected = plan.memory_estimate or {}

    def before(nbytes: float | None) -> str:
        return "" if nbytes is None else f"   before compiling: {gigabytes(nbytes)}"

    rows = {
        name: f"{gigabytes(plan.memory[name]):>9}{before(expected.get(name))}" for name in CLASSES
    }
    total = sum(expected.values()) if expected else None
    rows["sum"] = f"{gigabytes(plan.memory_total):>9}{before(total)}"
    rows["compiler's total"] = (
        f"{gigabytes(plan.memory_compiler):>9}   the sum is "
        f"{plan.memory_total / plan.memory_compiler - 1:+.1%} of it"
    )
    if plan.memory_beside:
        rows["beside the step"] = f"{gigabytes(plan.memory_beside):>9}   a reference, all the while"
    if plan.memory_host:
        rows["of the host"] = f"{gigabytes(plan.memory_host):>9}   for every device"
    if plan.memory_limit is not None:
        word = "fits" if plan.fits else "DOES NOT FIT"
        rows["device has"] = f"{gigabytes(plan.memory_limit):>9}   {word}"
    return rows


def _work(plan: Plan) -> dict[str, str]:
    compiled = f"{si(plan.flops)}FLOP compiled"
    if plan.flops_model is not None:
        compiled += (
            f", {si(plan.flops_model)}FLOP needed by the model (ratio "
            f"{plan.flops / plan.flops_model:.3f})"
        )
    traffic = f"{si(plan.traffic)}B, were everything written and read: an estimate"
    rows = {"operations": compiled, "memory traffic": traffic}
    if plan.to_host or plan.from_host:
        rows["to and from the host"] = f"{si(plan.to_host)}B and {si(plan.from_host)}B"
    smallest = 1e-3 * max((c["nbytes"] for c in plan.collectives), default=0.0)
    for c in plan.collectives:
        if c["nbytes"] >= smallest:
            calls = f"{si(c['nbytes'])}B in {c['calls']:,.0f} calls"
            rows[f"{c['kind']} over {c['where']}"] = calls
    return rows


def _bound(plan: Plan) -> dict[str, str]:
    rows = {"compute": duration(plan.compute_s), "state in memory": duration(plan.memory_s)}
    for axes, seconds in plan.network_s.items():
        if seconds >= 1e-3 * plan.bound_s:
            rows[f"network: {axes}"] = duration(seconds)
    if plan.to_host or plan.from_host:
        rows["the host's link"] = duration(plan.host_s) if plan.host_s else "not known"
    if plan.bubble:
        rows["pipeline bubble"] = (
            f"{plan.bubble:.1%} of a device's steps ({plan.pipeline_microbatches} microbatches): "
            "spent on padding, which all figures here include"
        )
    if plan.expert_bubble:
        rows["expert bubble"] = (
            f"none at an even load, as counted here; up to {plan.expert_bubble:.1%} of the compute "
            "time if one shard's buffers are full"
        )
    rows["step"] = f"{duration(plan.bound_s)} with perfect overlap, bound by {plan.bound_by}"
    if plan.mfu_bound is not None:
        rows["MFU bound"] = f"{plan.mfu_bound:.1%}"
    return rows


def _forecast(plan: Plan) -> dict[str, str]:
    assert plan.forecast is not None
    f = plan.forecast
    rows = {
        layer: f"{duration(seconds)} ({seconds / f['step']:.0%})"
        for layer, seconds in sorted(f["layers"].items(), key=lambda item: -item[1])
        if seconds >= 1e-3 * f["step"]
    }
    rows["communication not hidden"] = f"{duration(f['exposed'])} ({f['exposed'] / f['step']:.0%})"
    rows["step"] = f"{duration(f['step'])}, {duration(f['low'])} to {duration(f['high'])}"
    assert plan.rate is not None  # there is a forecast
    rows[f"{plan.unit} per second and chip"] = _rate(plan.rate)
    if plan.mfu is not None:
        rows["MFU"] = f"{plan.mfu:.1%}"
    return rows


def _phases(plan: Plan) -> dict[str, str]:
    phases = [Stock(**p) for p in plan.phases]
    step_s = plan.bound_s if plan.forecast is None else plan.forecast["step"]
    total = step_s + sum(p.seconds for p in phases)

    def share(seconds: float) -> str:
        return f"{duration(seconds):>9}  {seconds / total:5.1%}"

    word = "the least" if plan.forecast is None else "forecast"
    rows = {"a step": f"{share(step_s)}  {word}"}
    for p in phases:
        size = "DOES NOT FIT" if p.memory is None else gigabytes(p.memory)
        memory = f"{size} beside {gigabytes(p.held)}" if p.held else size
        calls = f"{p.calls:,.4g} x {duration(p.bound_s)} by {p.bound_by}"
        beside = ", while steps are taken" if p.beside else ""
        rows[p.name] = f"{share(p.seconds)}  {calls}; {memory}{beside}"
    rows["together"] = f"{duration(plan.whole_s):>9}"
    return rows


def _changes(plan: Plan) -> dict[str, str]:
    """Each change: memory, time of a step, and its rate by that of the recipe as it stands."""
    own = plan.changes[0]
    room = plan.memory_limit and plan.memory_limit - plan.memory_beside
    rows = {}
    for c in plan.changes:
        full = " (DOES NOT FIT)" if room and c["nbytes"] > room else ""
        apart = "" if c is own else f", {c['rate'] / own['rate'] - 1:+.1%}"
        rows[c["change"]] = (
            f"{gigabytes(c['nbytes'])}{full}, a step of {duration(c['step_s'])}, "
            f"{_rate(c['rate'])} tokens/s/chip{apart}"
        )
    return rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _run(plan: Plan) -> dict[str, str]:
    rows = {"length": f"{si(plan.work_total)} {plan.unit} in {plan.steps:,} steps"}
    if plan.days is None:
        return rows | {"time": "none: it does not fit"}
    assert plan.work_per_day is not None and plan.chip_hours is not None
    least = "at least " if plan.forecast is None else ""
    rows["time"] = f"{least}{plan.days:.3g} days, {si(plan.chip_hours)} chip-hours"
    rows[f"{plan.unit} per day"] = si(plan.work_per_day)
    if plan.cost is not None:
        rows["cost"] = f"{si(plan.cost)} {plan.currency} at {plan.price:g} a chip-hour"
    return rows


def draw(plan: Plan, path: Path) -> Path:
    """Saves the picture of a plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(plan).savefig(path)
    return path


def figure(plan: Plan) -> Any:
    """A picture: memory by class against the limit, and the times a step is bound by."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(1.0, 1.3))
    mesh = " x ".join(f"{a}={n}" for a, n in plan.mesh.items())
    figure.suptitle(
        f"{plan.recipe} on {plan.topology} ({plan.chips:,} chips; {mesh})", fontsize=11, color=_INK
    )
    _draw_memory(plan, above)
    _draw_time(plan, below)
    return figure


def _draw_memory(plan: Plan, axes: Any) -> None:
    rows = [("compiled program", plan.memory)]
    if plan.memory_estimate is not None:
        rows.insert(0, ("before compiling", plan.memory_estimate))
    last = len(rows) - 1
    for y, (_, classes) in enumerate(rows):
        left = 0.0
        for name, colour in zip(CLASSES, _COLOURS, strict=True):
            width, label = classes[name] / 1e9, name if y == last else None
            axes.barh(y, width, left=left, color=colour, label=label, height=0.6)
            left += width
    total = [plan.memory_compiler / 1e9] * 2
    axes.plot(total, [last - 0.4, last + 0.4], color=_INK, lw=2, label="compiler's total")
    if plan.memory_limit is not None:
        axes.axvline(plan.memory_limit / 1e9, color="#CC0000", ls="--", label="device has")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("GB of one device", fontsize=8, color=_MUTED)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.45, 1.5), frameon=False)
    _plain(axes)


def _draw_time(plan: Plan, axes: Any) -> None:
    network = {k: v for k, v in plan.network_s.items() if v >= 1e-2 * plan.bound_s}
    times = {"compute": plan.compute_s, "state in memory": plan.memory_s}
    times |= {f"network: {k}": v for k, v in network.items()}
    times |= {"the host's link": plan.host_s} if plan.host_s else {}
    names = list(times)[::-1]
    colours = [_COLOURS[4] if times[n] == plan.bound_s else _COLOURS[1] for n in names]
    axes.barh(range(len(names)), [times[n] for n in names], color=colours, height=0.6)
    for y, name in enumerate(names):
        axes.text(times[name], y, f" {duration(times[name])}", va="center", fontsize=7, color=_INK)
    said = "seconds of a step, each alone"
    if plan.forecast is not None:
        _draw_forecast(plan.forecast, len(names), axes)
        names.append("forecast")
        said += f", and as forecast{'' if plan.mfu is None else f': MFU {plan.mfu:.0%}'}"
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(said, fontsize=8, color=_MUTED)
    _plain(axes)


def _draw_forecast(forecast: dict[str, Any], y: int, axes: Any) -> None:
    """A bar of the layers, those wide enough with their names, and the range as a line."""
    parts = sorted(forecast["layers"].items(), key=lambda item: -item[1])
    left = 0.0
    for n, (name, seconds) in enumerate([*parts, ("network", forecast["exposed"])]):
        colour = _COLOURS[-1] if n == len(parts) else _LAYERS[min(n, len(_LAYERS) - 1)]
        axes.barh(y, seconds, left=left, color=colour, height=0.6)
        if seconds >= 0.08 * forecast["high"]:
            axes.text(left, y, f" {name}", va="center", fontsize=7, color="white")
        left += seconds
    axes.plot([forecast["low"], forecast["high"]], [y - 0.4] * 2, color=_INK, lw=1.5)
    axes.text(left, y, f" {duration(left)}", va="center", fontsize=7, color=_INK)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=_MUTED)
