"""Reinforcement learning from nothing on a CPU: texts, a start, and runs of several seeds.

    python benchmarks/rl_from_scratch.py [--seeds 0 1 2] [--only base]

Writes ``runs/rl_texts`` (worked problems of the training side, a tokenizer of characters), trains
``runs/rl_base`` on them by configs/rl/base.yaml, then runs configs/rl/chain_sum.yaml once for each
seed, and prints what held-out problems came to before and after. Everything is resumed where it was
stopped. What it printed is in benchmarks/rl_from_scratch.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from step_jax.cli.main import main as step_jax
from step_jax.core.config import load_file
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers.rl.config import Config

TEXTS = Path("runs/rl_texts")
RECIPE = Path("configs/rl/chain_sum.yaml")
SYMBOLS = "0123456789+-*/()=;#,:"


def write_texts(count: int) -> None:
    """Worked problems that the run never holds out, and the tokenizer of their characters."""
    if (TEXTS / "texts.jsonl").exists():
        return
    (TEXTS / "tokenizer").mkdir(parents=True, exist_ok=True)
    character_tokenizer(SYMBOLS, "<end>").save(TEXTS / "tokenizer")
    asked = load_file(Config, RECIPE).problems
    problems, thinking = asked.open(), asked.task.thinking
    with open(TEXTS / "texts.jsonl", "w") as file:
        for index in range(count):
            problem = problems.train(1, index)  # of a seed that no run has
            text = problem.question + problem.reply(thinking)
            file.write(json.dumps({"text": text}) + "\n")


def evaluations(run: Path) -> list[dict]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["event"] == "eval"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["base"], help="stop before reinforcement learning")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("flags", nargs="*", help="of step-jax rl, after --")
    args = parser.parse_args()
    write_texts(args.texts)
    if step_jax(["pretrain", "configs/rl/base.yaml"]):
        raise SystemExit("the start could not be trained")
    if args.only:
        return
    rows = []
    for seed in args.seeds:
        run, clock = Path(f"runs/rl_chain_sum_{seed}"), time.process_time()
        flags = ["--run.directory", str(run), "--run.seed", str(seed), *args.flags]
        if step_jax(["rl", str(RECIPE), *flags]):
            raise SystemExit(f"the run of seed {seed} failed")
        first, *_, last = evaluations(run)
        rows.append((seed, first, last, time.process_time() - clock))
    n = max(int(k[5:]) for k in rows[0][1] if k.startswith("pass@") and k[5:].isdecimal())
    print(f"| seed | pass@1 before | after | pass@{n} before | after | tokens before | after "
          "| CPU-s |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for seed, *both, seconds in rows:
        passed = [f"{e['pass@1']:.3f} [{e['pass@1_low']:.3f}, {e['pass@1_high']:.3f}]"
                  for e in both]  # fmt: skip
        most = [f"{e[f'pass@{n}']:.3f}" for e in both]
        tokens = [f"{e['answer_tokens']:.1f}" for e in both]
        print(f"| {seed} | {' | '.join(passed + most + tokens)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
