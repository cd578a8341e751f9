"""Algorithms, lambda, the pull to a reference and staleness side by side: one start, one task.

    python benchmarks/rl_algorithms.py [--groups algorithms lambda kl staleness] [--seeds 0 1 2]

Each variant is configs/rl/addition.yaml with the flags below, for 40 batches of 16 problems x 16
answers, ``--updates`` for each (with one, ratios are 1 but for staleness; with two, clips matter).
Runs are in ``runs/rl_algorithms``; what is finished is kept, what was stopped goes on. It ends with
tables in Markdown and pictures beside the runs; what it printed is in benchmarks/rl_algorithms.md.

Two ways to be fair: after the same batches, and after the same tokens sampled (dynamic sampling
samples more for a batch). Held-out accuracy between two evaluations is taken to lie on the line
between them. Intervals are Student's, over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rl_from_scratch import RECIPE, evaluations, write_texts

from step_jax.cli.main import main as step_jax

RUNS, BATCHES = Path("runs/rl_algorithms"), 40
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles by the number of seeds
NONE, TRUNCATE = "[]", '[{"kind": "truncate"}]'
GAE = '{"kind": "gae", "gae_lambda": 0.95}'

Flags = dict[str, object]
ALGORITHMS = ("ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "mis_po")
#: group -> name of a variant -> its flags. A name has one meaning, so groups share their runs.
GROUPS: dict[str, dict[str, Flags]] = {
    "algorithms": {name: {"algorithm.name": name} for name in ALGORITHMS},
    "lambda": {
        "ppo": {"algorithm.name": "ppo"},
        "ppo, lambda 0.95": {"algorithm.name": "ppo", "algorithm.signal": GAE},
    },
    "kl": {
        "ppo": {"algorithm.name": "ppo"},
        "ppo, KL 0.001": {"algorithm.name": "ppo", "algorithm.kl": 0.001},
    },
    "staleness": {
        "mis_po": {"algorithm.name": "mis_po"},
        "dr_grpo": {"algorithm.name": "dr_grpo"},
    }
    | {
        f"{name}{', ' + how if how else ''}, lag {lag}": {
            "algorithm.name": name,
            "rollout.lag": lag,
            **({} if corrections is None else {"algorithm.corrections": corrections}),
        }
        for lag in (2, 8)
        for name, how, corrections in (
            ("mis_po", "", None),
            ("mis_po", "no filter", NONE),
            ("dr_grpo", "", None),
            ("dr_grpo", "truncated weights", TRUNCATE),
        )
    },
    # rates of a fifth: what a lag costs depends on how far a batch moves the policy
    "slow staleness": {
        f"{name}{', ' + how if how else ''}, rate 1e-4, lag {lag}": {
            "algorithm.name": name,
            "optimizer.learning_rate": 1e-4,
            "rollout.lag": lag,
            **({} if corrections is None else {"algorithm.corrections": corrections}),
        }
        for lag in (0, 2, 8)
        for name, how, corrections in (
            ("mis_po", "", None),
            ("dr_grpo", "", None),
            ("dr_grpo", "truncated weights", TRUNCATE),
        )
        if lag or not how  # without a lag there is nothing to correct
    },
}


def common(updates: int) -> Flags:
    """The flags of every variant."""
    return {
        "training.steps": BATCHES * updates,
        "training.updates": updates,
        "evaluation.every_steps": 10 * updates,
        "evaluation.samples": 8,
        "run.checkpoint.every_steps": 20 * updates,
    }


def folder(name: str, seed: int, updates: int) -> Path:
    return RUNS / f"updates_{updates}" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(path: Path, flags: Flags, seed: int, updates: int) -> None:
    """Runs a variant; nothing happens if that is done."""
    if (path / "metrics.jsonl").exists() and len(curve(path)[0]) > BATCHES // 10:
        return
    given = common(updates) | {"run.directory": path, "run.seed": seed} | flags
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    if step_jax(["rl", str(RECIPE), *words]):
        raise SystemExit(f"{path} failed")


def curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(tokens sampled in all, pass@1) at every evaluation."""
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    written, last = {}, None
    for r in records:
        if r["event"] == "step" and r["rollout_s"] != last:  # every update of a batch says it
            last = r["rollout_s"]
            written[r["step"]] = last * r["rollout_tokens_per_s"]
    found = evaluations(path)
    steps = [e["step"] for e in found]
    tokens = [sum(n for step, n in written.items() if step <= at) for at in steps]
    return np.asarray(tokens), np.asarray([e["pass@1"] for e in found])


def interval(values) -> str:
    """Mean and 95 % interval over seeds."""
    mean, n = np.mean(values), len(values)
    if n not in STUDENT:
        return f"{mean:.3f}"
    half = STUDENT[n] * np.std(values, ddof=1) / math.sqrt(n)
    return f"{mean:.3f} ± {half:.3f}"


def table(names, seeds: list[int], updates: int, tokens: float) -> str:
    """One row a variant, in Markdown."""
    lines = [
        f"| | pass@1 before | after {BATCHES} batches | seeds | tokens sampled | "
        f"after {tokens / 1e3:.0f}k tokens |\n|---|---|---|---|---|---|"
    ]
    for name in names:
        curves = [curve(folder(name, seed, updates)) for seed in seeds]
        first, last = ([y[k] for _, y in curves] for k in (0, -1))
        common = [np.interp(tokens, *both) for both in curves]
        each = ", ".join(f"{y:.3f}" for y in last)
        spent = np.mean([x[-1] for x, _ in curves])
        lines.append(
            f"| {name} | {np.mean(first):.3f} | {interval(last)} | {each} | {spent / 1e3:.0f}k | "
            f"{interval(common)} |"
        )
    return "\n".join(lines)


def draw(group: str, names, seeds: list[int], updates: int) -> Path:
    """Mean over seeds against tokens sampled, with the range of the seeds."""
    fig, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    for number, name in enumerate(names):
        x_SN, y_SN = (
            np.stack(a) for a in zip(*(curve(folder(name, s, updates)) for s in seeds), strict=True)
        )
        line = ("-", "--", ":")[number // 7]
        axes.plot(x_SN.mean(0), y_SN.mean(0), line, marker="o", ms=3, label=name)
        axes.fill_between(x_SN.mean(0), y_SN.min(0), y_SN.max(0), alpha=0.12)
    axes.set(xlabel="tokens sampled", ylabel="held-out pass@1", ylim=(0, 1))
    of = f"mean and range of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    axes.set_title(f"{group}: {of}", fontsize=10)
    axes.grid(alpha=0.3)
    fig.legend(fontsize=8, loc="outside right center")
    path = RUNS / f"updates_{updates}" / f"{group}.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=1)
    args = parser.parse_args()
    seeds, updates = args.seeds, args.updates
    write_texts(20_000)
    if step_jax(["pretrain", "configs/rl/base.yaml"]):
        raise SystemExit("the start could not be trained")
    for seed in seeds:  # all of one seed first: stopped early, there is still a comparison
        for group in args.groups:
            for name, flags in GROUPS[group].items():
                train(folder(name, seed, updates), flags, seed, updates)
    for group in args.groups:
        names = GROUPS[group]
        ends = [curve(folder(n, s, updates))[0][-1] for n in names for s in seeds]
        print(f"\n## {group}\n\n{table(names, seeds, updates, min(ends))}\n")
        print(f"picture: {draw(group, names, seeds, updates)}")


if __name__ == "__main__":
    main()
