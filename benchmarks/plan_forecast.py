"""What published runs reached of their chips, and how well that forecasts runs held out.

python -m benchmarks.plan_forecast count [NAME ...]
                                             count the runs' work from shapes: counts.json
python -m benchmarks.plan_forecast compile [NAME ...]
                                             count compiled steps beside them, one after another;
                                             what is there already is not compiled again
python -m benchmarks.plan_forecast fit       fit the shares: step_jax/planning/efficiencies.py
python -m benchmarks.plan_forecast report    forecasts beside the measured times, in Markdown

The fit is of few parameters to few runs: the logarithm of every share of the peak is that of its
kind plus a deviation of the chip, which is drawn towards zero, so a chip with one run leans on the
others. Runs marked ``held_out`` have no part in it. Matrix units 256 wide are half filled by
attention's heads of 128 (v6e, tpu7x): their shares start at half.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent / "published"
COUNTS = HERE / "counts.json"
TABLE = Path(__file__).parents[1] / "step_jax" / "planning" / "efficiencies.py"

RECIPE = """
run: {directory: unused}
training: {tokens: 1e12}
data: {path: unused}
optimizer: {kind: adamw, learning_rate: 3e-4, schedule: {kind: cosine, warmup_steps: 2000}}
execution: {remat: full}
parallel: {fsdp: -1}
"""


def runs() -> list[dict[str, Any]]:
    """The published runs; every one has its measured ``seconds``."""
    found = yaml.safe_load((HERE / "runs.yaml").read_text(encoding="utf-8"))
    for run in found["runs"]:
        run["model"] = found["models"][run["model"]]
        if "tokens_per_chip" in run:
            devices = int(run["topology"].rpartition("x")[2])
            run["seconds"] = run["rows"] * run["sequence"] / devices / run["tokens_per_chip"]
    return found["runs"]


def config_of(run: Mapping[str, Any], *flags: str) -> Any:
    """The configuration of pretraining that does a run's step."""
    from step_jax.core.command_line import load_config
    from step_jax.trainers import pretrain

    recipe = yaml.safe_load(RECIPE) | {"model": run["model"]}
    recipe["training"]["batch_size"] = run["rows"]
    recipe["data"]["sequence_length"] = run["sequence"]
    recipe["parallel"] |= run.get("parallel", {})
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(recipe, file)
        file.flush()
        return load_config(pretrain.Config, [file.name, *flags]).config


# --- Counts ---------------------------------------------------------------------------------------


def counted(run: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a run's work at the peak, by shapes alone, as much again as the run repeats."""
    from step_jax.planning import estimate, forecast, roofline, topology
    from step_jax.planning.case import case_of
    from step_jax.planning.compiled import program_for, resolved
    from step_jax.trainers import pretrain

    at = topology.parse(run["topology"])
    cases = []
    for remat in ("none", "full"):
        config = resolved(config_of(run, "--execution.remat", remat), at.count)
        program = program_for(pretrain, config, at)
        cases.append(case_of(program, config.execution))
    once, again = (forecast.ideal(estimate.work(case), at, "bfloat16") for case in cases)
    seconds = {}
    for (layer, kind), most in again.items():
        share = _repeated(run["again"], layer, kind)
        least = once.get((layer, kind), 0.0)
        seconds[f"{layer} {kind}"] = least + share * (most - least)
    mesh = cases[1].sharding.mesh
    network = roofline.network(estimate.sent(cases[1], at), at, mesh)
    state = cases[1].held.touched / at.chip.hbm_bandwidth
    return {"chip": at.chip.name, "platform": at.platform, "at_peak": seconds,
            "network": network, "state": state}  # fmt: skip


def _repeated(again: Mapping[str, float], layer: str, kind: str) -> float:
    """Share of a forward pass that is computed again, of a kind of work in a layer."""
    if (layer, kind) == ("attention", "attention"):
        return again["attention"]
    if layer == "attention":
        return again["projections"]
    return (
        again.get("experts", again.get("dense", 1))
        if layer == "experts"
        else again.get("dense", again.get("experts", 1))
    )


def count(names: list[str]) -> None:
    """Counts the runs of those names, or all."""
    for run in runs():
        if names and run["name"] not in names:
            continue
        saved = _saved()
        kept = saved.get(run["name"], {}).get("compiled")
        saved[run["name"]] = counted(run) | ({"compiled": kept} if kept else {})
        _save(saved)
        print(run["name"], f"{sum(saved[run['name']]['at_peak'].values()):.2f} s at the peak")


def compile_all(names: list[str]) -> None:
    """Adds what the compiled step of the same size, remat full, counts."""
    from step_jax.planning import topology
    from step_jax.planning.plan import make_plan
    from step_jax.trainers import pretrain

    for run in runs():
        saved = _saved()
        if "compiled" in saved[run["name"]] or (names and run["name"] not in names):
            continue
        plan = make_plan(pretrain, config_of(run), topology.parse(run["topology"]))
        saved[run["name"]]["compiled"] = compiled_counts(plan)
        _save(saved)


def compiled_counts(plan) -> dict[str, Any]:
    """What of a plan is kept."""
    return {
        "layers": {f"{row['layer']} {row['kind']}": row["amount"] for row in plan.layers},
        "flops": plan.flops,
        "traffic": plan.traffic,
        "network": plan.network_s,
        "bound": plan.bound_s,
        "fits": plan.fits,
        "versions": plan.versions,
    }


def _saved() -> dict[str, Any]:
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}


def _save(saved: dict[str, Any]) -> None:
    COUNTS.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


# --- Fit ------------------------------------------------------------------------------------------

#: Kind -> (share of the peak to start from, how far a kind and a chip may be from it, as the
#: standard deviation of the logarithm).
START = {
    "attention": (0.5, 0.3, 0.2),
    "dense": (0.75, 0.3, 0.15),
    "experts": (0.8, 0.2, 0.15),  # of what dense products reach
    "elementwise": (0.7, 0.2, 0.0),
    "optimizer": (0.7, 0.1, 0.0),
}
HALF_FILLED = ("v6e", "tpu7x")
#: Platform -> share of the collectives that is not hidden, and its deviation.
EXPOSED = {"tpu": (0.2, 0.3), "gpu": (0.5, 0.3)}
#: Deviation of a measured time from its forecast that the fit expects; mixtures differ more, by how
#: their rows are sorted and sent.
NOISE, NOISE_EXPERTS = 0.05, 0.15


class Fit:
    """Shares of the peak by chip and kind, from runs."""

    def __init__(self, seen: Iterable[Mapping[str, Any]]):
        seen = list(seen)
        chips = sorted({run["chip"] for run in seen})
        self.names: list[Any] = [(None, kind) for kind in START]
        self.names += [(c, k) for c, k in itertools.product(chips, START) if START[k][2]]
        self.names += list(EXPOSED)
        self.place = {name: n for n, name in enumerate(self.names)}
        self.values = self._solved(seen)

    def _solved(self, seen) -> np.ndarray:
        """Least squares by Gauss and Newton, on logarithms."""
        width = np.array([self._width(name) for name in self.names])
        mixture = np.array([has_experts(run) for run in seen])
        noise = np.where(mixture, NOISE_EXPERTS, NOISE)
        measured = np.log([run["seconds"] for run in seen])
        values = np.zeros(len(self.names))
        for _ in range(200):
            seconds, slopes = zip(*(self._slope(run, values) for run in seen), strict=True)
            off = (np.log(seconds) - measured) / noise
            # of Cauchy's distribution: a mixture that is far off draws the others no further
            robust = np.sign(off) * np.sqrt(np.log1p(off**2))
            steep = np.divide(off, (1 + off**2) * robust, out=np.ones_like(off), where=robust != 0)
            weight = np.where(mixture, steep, 1.0) / noise
            slope = np.concatenate([np.array(slopes) * weight[:, None], np.diag(1 / width)])
            left = np.concatenate([np.where(mixture, robust, off), values / width])
            change = np.linalg.lstsq(slope, -left, rcond=None)[0]
            values = values + 0.5 * change
            if np.max(np.abs(change)) < 1e-7:
                break
        return values

    def _slope(self, run: Mapping[str, Any], values) -> tuple[float, np.ndarray]:
        """(the forecast of a run, derivatives of its logarithm by the values)."""
        reached, exposed = self.reached(run["chip"], values), self.exposed(run["platform"], values)
        spent = dict.fromkeys(START, 0.0)
        for name, at_peak in run["at_peak"].items():
            kind = name.split()[1]
            spent[kind] += at_peak / reached[kind]
        network, slope = sum(run["network"].values()), np.zeros(len(values))
        alone = exposed * network
        total = sum(spent.values()) + alone
        if total < network:  # nothing but the network counts
            return network, slope
        slope[self.place[run["platform"]]] = alone / total
        spent["dense"] += spent["experts"]  # whose share is one of dense products'
        for kind, seconds in spent.items():
            for name in ((None, kind), (run["chip"], kind)):
                if name in self.place:
                    slope[self.place[name]] -= seconds / total
        return total, slope

    @staticmethod
    def _width(name) -> float:
        if isinstance(name, str):
            return EXPOSED[name][1]
        chip, kind = name
        return START[kind][1 if chip is None else 2]

    def reached(self, chip: str | None, values=None) -> dict[str, float]:
        """Kind -> share of the peak on a chip; None for one that no run was on."""
        values = self.values if values is None else values
        found = {}
        for kind, (start, *_) in START.items():
            log = values[self.place[None, kind]]
            if (chip, kind) in self.place and chip is not None:
                log = log + values[self.place[chip, kind]]
            half = 0.5 if kind == "attention" and chip in HALF_FILLED else 1.0
            found[kind] = float(half * start * np.exp(log))
        return found | {"experts": found["experts"] * found["dense"]}

    def exposed(self, platform: str, values=None) -> float:
        values = self.values if values is None else values
        return float(EXPOSED[platform][0] * np.exp(values[self.place[platform]]))

    def seconds(self, run: Mapping[str, Any]) -> float:
        """The forecast of a run."""
        return self._slope(run, self.values)[0]


def data() -> list[dict[str, Any]]:
    """Runs with their counts."""
    saved = _saved()
    return [run | saved[run["name"]] for run in runs() if run["name"] in saved]


def has_experts(run: Mapping[str, Any]) -> bool:
    return run["at_peak"].get("experts experts", 0.0) > 0


def errors(found: Iterable[Mapping[str, Any]]) -> list[tuple[dict, float, float, float]]:
    """(run, bound, forecast, forecast by a fit that has not seen it) of each."""
    found = list(found)
    main = Fit(run for run in found if not run.get("held_out"))
    rows = []
    for run in found:
        others = (
            main
            if run.get("held_out")
            else Fit(other for other in found if other is not run and not other.get("held_out"))
        )
        rows.append((run, bound(run), main.seconds(run), others.seconds(run)))
    return rows


def bound(run: Mapping[str, Any]) -> float:
    """Seconds that a run cannot be faster than: products, state and each axis's network."""
    kinds = (name.split()[1] for name in run["at_peak"])
    products = (
        s for s, kind in zip(run["at_peak"].values(), kinds, strict=True)
        if kind in ("attention", "dense", "experts")
    )  # fmt: skip
    return max(sum(products), run["state"], *run["network"].values(), 0.0)


def spreads(rows) -> dict[str, float]:
    """Kind of model -> error that two thirds of the forecasts of unseen runs stay within."""
    found: dict[str, list[float]] = {"dense": [], "experts": []}
    for run, _, _, unseen in rows:
        kind = "experts" if has_experts(run) else "dense"
        found[kind].append(abs(np.log(unseen / run["seconds"])))
    return {k: float(np.expm1(np.quantile(v, 2 / 3))) if v else 0.25 for k, v in found.items()}


def table(found: list[dict[str, Any]]) -> str:
    """The text of ``efficiencies.py``."""
    fit = Fit(run for run in found if not run.get("held_out"))
    chips = sorted({run["chip"] for run in found if not run.get("held_out")})
    # the same chip with more memory
    like = {c: c for c in chips} | ({"H200": "H100"} if "H100" in chips else {})

    def rounded(shares: Mapping[str, float], indent: str = "") -> str:
        rows = (f'{indent}    "{k}": {v:.3f},' for k, v in shares.items())
        return "\n".join(["{", *rows, indent + "}"])

    lines = [
        '"""What published runs reached of their chips: by ``benchmarks/plan_forecast.py``."""'
    ]
    lines += ["", "#: Chip -> kind of work -> share of the peak.", "CHIPS = {"]
    lines += [f'    "{c}": {rounded(fit.reached(of), "    ")},' for c, of in like.items()]
    lines += ["}", "", "#: The same for chips without a published run."]
    lines += [f"OTHER_CHIPS = {rounded(fit.reached(None))}", ""]
    lines += ["#: Platform -> share of the collectives that nothing hides."]
    lines += [f"EXPOSED = {rounded({p: fit.exposed(p) for p in EXPOSED})}", ""]
    lines += ["#: Kind of model -> error that two thirds of the forecasts of unseen runs keep to."]
    lines += [f"SPREAD = {rounded(spreads(errors(found)))}"]
    return "\n".join(lines) + "\n"


def report() -> str:
    """The runs as a table in Markdown, with the errors of unseen ones below."""
    rows = errors(data())
    lines = [
        "| run | measured s | bound s | forecast s | unseen by the fit |",
        "|---|---|---|---|---|",
    ]
    for run, least, known, unseen in rows:
        name = run["name"] + (" (held out)" if run.get("held_out") else "")
        lines.append(
            f"| {name} | {run['seconds']:.2f} | {least:.2f} | {known:.2f} "
            f"| {unseen:.2f} ({unseen / run['seconds'] - 1:+.0%}) |"
        )
    for kind in ("dense", "experts"):
        for word, held in (("held out", True), ("left out one by one", False)):
            off = [
                abs(unseen / run["seconds"] - 1)
                for run, _, _, unseen in rows
                if has_experts(run) == (kind == "experts") and bool(run.get("held_out")) == held
            ]
            if off:
                lines.append(
                    f"\n{kind}, {word}: {len(off)} runs, median error {np.median(off):.0%}, "
                    f"largest {max(off):.0%}"
                )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    match argv:
        case ["count", *names]:
            count(names)
        case ["compile", *names]:
            compile_all(names)
        case ["fit"]:
            TABLE.write_text(table(data()), encoding="utf-8")
        case ["report"]:
            print(report())
        case _:
            print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
