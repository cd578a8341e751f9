"""The dual path of Step-Video's autoencoder against its convolutions alone, on real clips.

    python configs/video/real_sets.py real
    python benchmarks/vae_heads.py runs/vae_heads [--seeds 0 1 2] [--steps 300]

Trains `configs/video/vae_small.yaml` with both heads from the same seeds: the same parameters and
convolutions (the shortcuts of the dual path have neither), compression, clips and order. Prints the
held-out figures of each run, and the differences seed by seed. A run that was stopped goes on; one
that is finished is only read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from step_jax.runs.metrics_log import read_metrics

HEADS = ("dual_path", "plain")
BETTER = {"psnr": 1, "ssim": 1, "lpips": -1}  # the sign of what is better
RECIPE = Path(__file__).parents[1] / "configs" / "video" / "vae_small.yaml"


def train(run: Path, head: str, seed: int, steps: int) -> None:
    command = [
        sys.executable, "-m", "step_jax", "vae", str(RECIPE), "--run.directory", str(run),
        "--run.seed", str(seed), "--model.head", head, "--training.steps", str(steps),
    ]  # fmt: skip
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / f"{run.name}.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def figures(run: Path, steps: int) -> dict[str, float] | None:
    """The held-out figures after the last step, if the run has come so far."""
    if not (run / "metrics.jsonl").exists():
        return None
    found = [r for r in read_metrics(run) if r["event"] == "eval" and r["step"] == steps]
    return {name: found[-1][name] for name in BETTER} if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for seed in given.seeds:
        for head in HEADS:
            run = given.runs / f"{head}_{seed}"
            if figures(run, given.steps) is None:
                train(run, head, seed, given.steps)
            row = rows[head, seed] = figures(run, given.steps)
            print(f"{head:>9} seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
    print("\ndual_path minus plain, by seed, and its mean with the standard error:")
    for name, sign in BETTER.items():
        gaps = np.array([rows[HEADS[0], s][name] - rows[HEADS[1], s][name] for s in given.seeds])
        error = gaps.std(ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
        won = int((gaps * sign > 0).sum())
        listed = ", ".join(f"{gap:+.4f}" for gap in gaps)
        print(
            f"{name}: {listed}; {gaps.mean():+.4f} +- {error:.4f}; better in {won} of {len(gaps)}"
        )


if __name__ == "__main__":
    main()
