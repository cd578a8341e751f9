"""``step-jax checkpoints list|verify DIR``: look at saved steps without loading them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from step_jax.checkpoint import manifest
from step_jax.core.errors import CheckpointError, ConfigError, ExitCode


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="step-jax checkpoints", description=__doc__)
    parser.add_argument("action", choices=("list", "verify"), help="verify also reads every byte")
    parser.add_argument("directory", type=Path, help="run directory, or its checkpoints/")
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax checkpoints --help") from None
        raise


def run(options: argparse.Namespace) -> int:
    nested = options.directory / "checkpoints"
    root = nested if nested.is_dir() else options.directory
    steps = manifest.committed_steps(root)
    if not steps:
        raise CheckpointError(f"no saved steps in {root}: give a run directory")
    damaged = 0
    for step in steps:
        step_dir = root / manifest.step_name(step)
        size = sum((step_dir / n).stat().st_size for n in manifest.list_files(step_dir))
        if options.action == "list":
            state = _leaves(step_dir)
        else:
            problems = manifest.verify_step(step_dir)
            damaged += bool(problems)
            state = "verified" if not problems else "DAMAGED\n    " + "\n    ".join(problems)
        print(f"step {step:>9}  {size / 1e6:10.1f} MB  {state}")
    return ExitCode.FAILURE if damaged else ExitCode.OK


def _leaves(step_dir: Path) -> str:
    try:
        return f"{len(json.loads((step_dir / 'step.json').read_bytes())['leaves'])} arrays"
    except (OSError, ValueError, KeyError) as e:
        return f"unreadable step.json ({e}): run `step-jax checkpoints verify`"
