"""Thinking that pays: longer answers in training, and ways to spend tokens on a question.

    python benchmarks/rl_thinking.py [--only lengths] [--seeds 0 1 2]

Needs ``runs/rl_texts`` and ``runs/rl_base``, which it makes (`rl_from_scratch.py`). Then

- lengths: a start that mostly answers at once and sometimes works the sum out (one text in five) is
  rewarded for right answers alone. Do its answers grow longer?
- rounds: conclusions of the start (`step-jax solve`), fine-tuning on rounds of them worked out by
  its own right replies (configs/rl/rounds_base.yaml), reinforcement learning of rounds
  (configs/rl/rounds.yaml) and, from the same start and for as many batches, of the plain question.
  Then all three solve held-out sums: thinking budgets, votes, coordinated rounds, by tokens.

What is finished is kept, what was stopped goes on. It ends with tables in Markdown and pictures in
``runs/rl_thinking``; what it printed is in benchmarks/rl_thinking.md.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rl_from_scratch import RECIPE, evaluations, write_texts

from step_jax.cli.main import main as step_jax
from step_jax.core.config import load_file
from step_jax.environments.arithmetic import COMPACT
from step_jax.trainers.rl.config import Config

OUT = Path("runs/rl_thinking")
TASK = ["--task.kind", "addition", "--task.digits", "1", "2", "--max-new-tokens", "32"]
ROUND = ["{references}{question}", "{text};"]
MESSAGES = (4, 8)  # of a round that is learned
WORKED_OUT = 0.2  # of the texts with both ways to answer
WIDTHS = [[4], [8], [4, 4], [8, 4], [8, 8]]
BUDGETS = ("4", "8", "12", "16", "24")


def command(*words: object) -> None:
    if step_jax([str(word) for word in words]):
        raise SystemExit(f"step-jax {words[0]} failed")


def trained(run: Path, *words: object) -> None:
    """A run to its end; nothing happens if it is there."""
    done = run / "metrics.jsonl"
    if not (done.exists() and '"status": "done"' in done.read_text()):
        command(*words, "--run.directory", run)


# -- lengths --


def write_both_ways(folder: Path, count: int) -> None:
    """Sums of the training side, most of them answered at once."""
    if (folder / "texts.jsonl").exists():
        return
    problems, rng = load_file(Config, RECIPE).problems.open(), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "texts.jsonl", "w") as file:
        for index in range(count):
            problem = problems.train(1, index)
            worked = rng.random() < WORKED_OUT
            reply = problem.reply(COMPACT) if worked else COMPACT.write(None, problem.answer)
            file.write(json.dumps({"text": problem.question + reply}) + "\n")


def lengths(seeds: list[int]) -> None:
    write_both_ways(OUT / "both_ways", 20_000)
    start, rows = OUT / "both_ways_base", []
    trained(start, "pretrain", "configs/rl/base.yaml", "--data.path", OUT / "both_ways/texts.jsonl")
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for seed in seeds:
        run = OUT / f"both_ways_{seed}"
        flags = ["--init-from.artifact", start, "--run.seed", seed, "--evaluation.every_steps", 10]
        trained(run, "rl", RECIPE, *flags)
        found = evaluations(run)
        rows.append((seed, found))
        steps = [e["step"] for e in found]
        for axis, key in zip(axes, ("answer_tokens", "pass@1"), strict=True):
            axis.plot(steps, [e[key] for e in found], marker="o", ms=3, label=f"seed {seed}")
            axis.set(xlabel="batches of 16 problems", ylabel=f"held-out {key}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    fig.savefig(OUT / "lengths.png", dpi=110)
    plt.close(fig)
    steps = [e["step"] for e in rows[0][1]]
    print("\n| seed | |" + "".join(f" {step} batches |" for step in steps))
    print("|---|---|" + "---|" * len(steps))
    for seed, found in rows:
        for name, key, form in (("tokens", "answer_tokens", ".1f"), ("pass@1", "pass@1", ".3f")):
            print(f"| {seed} | {name} |" + "".join(f" {e[key]:{form}} |" for e in found))
    print(f"picture: {OUT / 'lengths.png'}")


# -- rounds --


def solved(model: Path, out: Path, *words: object) -> dict:
    """What ``step-jax solve`` found; computed once."""
    if not (out / "accuracy.json").exists():
        command("solve", model, *TASK, "--out", out, *words)
    return json.loads((out / "accuracy.json").read_text())


def round_flags(prefix: str) -> list[str]:
    return [f"--{prefix}round.prompt", ROUND[0], f"--{prefix}round.reference", ROUND[1]]


def write_rounds(samples: Path, out: Path) -> None:
    """Rounds of the start's conclusions as texts, worked out by its own right replies."""
    if (out / "train.jsonl").exists():
        return
    task = ["--task.kind", "coordinated", "--task.path", samples, "--heldout-fraction", 0.2]
    marks = ["--task.checked-by.kind", "numeric", "--task.checked-by.thinking.open", ""]
    marks += ["--task.checked-by.thinking.close", "#", *round_flags("task.rounds.")]
    size = ["--task.rounds.messages", *MESSAGES, "--form", "text", "--count", 8000, "--heldout", 0]
    command("problems", *task, *marks, *size, "--out", out)


def rounds(seeds: list[int]) -> None:
    conclusions, texts = Path("runs/rl_conclusions"), Path("runs/rl_rounds_texts")
    start = Path("runs/rl_rounds_base")
    asked = ["--side", "train", "--problems", 400, "--samples", 8, "--seed", 1]
    solved(Path("runs/rl_base"), conclusions, *asked)
    write_rounds(conclusions / "samples.jsonl", texts)
    trained(start, "pretrain", "configs/rl/rounds_base.yaml")
    models = {"start": [start]}
    for name, recipe in (
        ("plain questions", "configs/rl/addition.yaml"),
        ("rounds", "configs/rl/rounds.yaml"),
    ):
        models[name] = []
        for seed in seeds:
            run = Path(f"runs/rl_{name.replace(' ', '_')}_{seed}")
            trained(run, "rl", recipe, "--init-from.artifact", start, "--run.seed", seed)
            models[name].append(run)
    ways = ["--problems", 150, "--samples", 32, "--rounds", json.dumps(WIDTHS), *round_flags("")]
    ways += ["--budgets", *BUDGETS]
    found = {
        name: [solved(run, OUT / f"solved_{run.name}", *ways) for run in runs]
        for name, runs in models.items()
    }
    print_rounds(found)
    draw_rounds(found)


def curve(found: list[dict], way: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, accuracy) of a way, means over seeds."""
    points = np.asarray([[(p["tokens"], p["mean"]) for p in one["curves"][way]] for one in found])
    return points.mean(0)[:, 0], points.mean(0)[:, 1]


def print_rounds(found: dict[str, list[dict]]) -> None:
    print("\n| model | way | tokens a question | right | each seed | votes of as many tokens |")
    print("|---|---|---|---|---|---|")
    for name, of_seeds in found.items():
        votes = curve(of_seeds, "votes")
        for way in of_seeds[0]["curves"]:
            each = zip(*(one["curves"][way] for one in of_seeds), strict=True)
            for (tokens, right), points in zip(
                zip(*curve(of_seeds, way), strict=True), each, strict=True
            ):
                seeds = ", ".join(
                    f"{p['mean']:.3f} [{p['low']:.3f}, {p['high']:.3f}]" for p in points
                )
                inside = votes[0][0] <= tokens <= votes[0][-1]
                equal = np.interp(np.log(tokens), np.log(votes[0]), votes[1]) if inside else None
                other = "" if way == "votes" or equal is None else f"{equal:.3f}"
                print(f"| {name} | {way} | {tokens:.0f} | {right:.3f} | {seeds} | {other} |")


def draw_rounds(found: dict[str, list[dict]]) -> None:
    fig, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, (name, of_seeds) in enumerate(found.items()):
        for way, line in (("votes", "-o"), ("budgets of thoughts", ":x")):
            x, y = curve(of_seeds, way)
            axes.plot(x, y, line, color=f"C{number}", ms=4, label=f"{name}: {way}")
        x, y = curve(of_seeds, "coordinated rounds")
        axes.plot(x, y, "s", color=f"C{number}", ms=6, label=f"{name}: coordinated rounds")
        for widths, *at in zip(WIDTHS, x, y, strict=True):
            text = "+".join(map(str, [*widths, 1]))
            axes.annotate(text, at, (0, 5), textcoords="offset points", fontsize=7, ha="center")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens a question", ylabel="held-out sums answered right", ylim=(0, 1))
    axes.set_title("what was trained on: how tokens are spent", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    OUT.mkdir(parents=True, exist_ok=True)
    fig.savefig(OUT / "rounds.png", dpi=110)
    plt.close(fig)
    print(f"picture: {OUT / 'rounds.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["lengths", "rounds"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    write_texts(20_000)
    if not (Path("runs/rl_base") / "checkpoints").exists():
        trained(Path("runs/rl_base"), "pretrain", "configs/rl/base.yaml")
    if args.only != "rounds":
        lengths(args.seeds)
    if args.only != "lengths":
        rounds(args.seeds)


if __name__ == "__main__":
    main()
