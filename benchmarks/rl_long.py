"""Fifty thousand tokens of thought at a small width: written, judged, learned from.

    python benchmarks/rl_long.py [--tokens 50000] [--samples 2] [--batches 1]

A small decoder (MFA-Key-Reuse) reads one endless text of sums, so that it seldom ends one, less
still at the temperature of 0.5, and is then trained by PPO with answers of at most that many
tokens: policy, critic, reference. Printed are
seconds, peak memory and how far the engine's and the trainer's log-probabilities are apart; what it
printed is in benchmarks/rl_long.md. It shows how far the loop goes, not that anything is learned.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from rl_from_scratch import RECIPE, TEXTS, write_texts

from step_jax.cli.main import main as step_jax

RUNS = Path("runs/rl_long")
MODEL = """{width: 64, layers: [{repeat: 2, blocks: [{
  attention: {kind: mfa, heads: 4, head_dim: 16, value: gated_key},
  mlp: {kind: swiglu, hidden: 176}}]}]}"""
SHOWN = ("answer_tokens", "truncated_share", "rollout_gap", "kl", "entropy", "value_error",
         "slots_busy", "rollout_s", "rollout_tokens_per_s", "step_s")  # fmt: skip


def command(*words: object) -> None:
    if step_jax([str(word) for word in words]):
        raise SystemExit(f"step-jax {words[0]} failed")


def start() -> Path:
    """The decoder, after a minute of one text."""
    run, text = RUNS / "base", RUNS / "endless.txt"
    if not (run / "checkpoints").exists():
        write_texts(20_000)
        text.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.loads(line)["text"] for line in (TEXTS / "texts.jsonl").open())
        text.write_text(";".join(lines))
        flags = ["--data.path", text, "--training.steps", 100, "--model", MODEL]
        flags += ["--data.heldout-fraction", 0]
        command("pretrain", "configs/rl/base.yaml", *flags, "--run.directory", run)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1)
    args = parser.parse_args()
    base, run = start(), RUNS / f"ppo_{args.tokens}"
    begun = time.process_time()
    command("rl", RECIPE, "--run.directory", run, "--init-from.artifact", base,
            "--algorithm.name", "ppo", "--algorithm.kl", 0.001,
            "--training.steps", args.batches, "--training.prompts", 1,
            "--training.samples", args.samples, "--rollout.slots", args.samples,
            "--rollout.max-new-tokens", args.tokens, "--rollout.max-prompt-tokens", 16,
            "--rollout.temperature", 0.5, "--evaluation.temperature", 0.5,
            "--execution.remat", "full", "--execution.loss-chunks", 64,
            "--evaluation.every-steps", 0, "--evaluation.problems", 1,
            "--evaluation.samples", 1, "--optimizer.schedule.warmup-steps", 0)  # fmt: skip
    spent = time.process_time() - begun
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [r for r in records if r["event"] == "step"]
    print("\n| |" + "".join(f" batch {s['step']} |" for s in steps))
    print("|---|" + "---|" * len(steps))
    for key in SHOWN:
        if key in steps[0]:
            print(f"| {key} |" + "".join(f" {s[key]:.4g} |" for s in steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{spent:.0f} CPU-seconds with compilation, peak memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
