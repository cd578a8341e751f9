"""``step-jax checkpoints list|verify DIR``: look at saved steps without loading them."""

from __future__ import annotations

import argparse
import json

from step_jax.checkpoint import manifest
from step_jax.checkpoint.places import steps_at
from step_jax.core.errors import CheckpointError, ConfigError, ExitCode


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="step-jax checkpoints", description=__doc__)
    parser.add_argument("action", choices=("list", "verify"), help="verify also reads every byte")
    parser.add_argument("directory", help="run directory or its URL, or its checkpoints/")
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax checkpoints --help") from None
        raise


def run(options: argparse.Namespace) -> int:
    given = steps_at(options.directory).root
    root = given / "checkpoints"
    if not (steps := manifest.committed_steps(root)):
        root = given
        steps = manifest.committed_steps(root)
    if not steps:
        raise CheckpointError(f"no saved steps in {root}: give a run directory")
    damaged = 0
    for step in steps:
        step_dir = root / manifest.step_name(step)
        size = _size(step_dir)
        if options.action == "list":
            state = _leaves(step_dir)
        else:
            problems = manifest.verify_step(step_dir)
            damaged += bool(problems)
            state = "verified" if not problems else "DAMAGED\n    " + "\n    ".join(problems)
        print(f"step {step:>9}  {size / 1e6:10.1f} MB  {state}")
    return ExitCode.FAILURE if damaged else ExitCode.OK


def _size(step_dir: manifest.Place) -> int:
    """Bytes, as far as the manifest can be read."""
    try:
        return sum(size for size, _ in manifest.read_manifest(step_dir).values())
    except CheckpointError:
        return 0


def _leaves(step_dir: manifest.Place) -> str:
    try:
        info = json.loads(manifest.read_file(step_dir, "step.json"))
        return f"{len(info['leaves'])} arrays"
    except (OSError, ValueError, KeyError) as e:
        return f"unreadable step.json ({e}): run `step-jax checkpoints verify`"
