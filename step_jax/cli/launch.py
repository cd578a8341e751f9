"""``step-jax launch RECIPE --target FILE [--dry-run] [options] [--group.key VALUE ...]``."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.cli.arguments import load_recipe, loop_of
from step_jax.core.errors import ConfigError, StepError
from step_jax.core.files import write_whole
from step_jax.launch.job import Rendered
from step_jax.launch.target import Target, load_target, make_job
from step_jax.trainers import DEFAULT, Loop

_SUBMISSION_S = 300


@dataclass(frozen=True)
class Asked:
    """A loop, its name, its configuration, the recipe's file, the target and our own options."""

    loop: Loop
    name: str
    config: Any
    recipe: str
    target: Target
    options: argparse.Namespace


def parse(argv: list[str]) -> Asked:
    parser = argparse.ArgumentParser(
        prog="step-jax launch",
        usage="step-jax launch RECIPE.yaml --target FILE.yaml [options] [--group.key VALUE ...]",
        description="Run a recipe where a target file says: GKE, queued resources of Cloud TPU, "
        "SLURM, SkyPilot or this machine (launch/targets/ has one of each, docs/pods.md what they "
        "mean). The recipe is checked against the target first. --group.key VALUE changes the "
        "recipe; `step-jax LOOP FILE.yaml --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", required=True, metavar="FILE", help="where to run")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted, and the command"
    )
    parser.add_argument(
        "--force", action="store_true", help="submit without a plan, or against what it says"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("launches"), metavar="DIR",
        help="for the files of jobs (default: launches); under SLURM a folder that nodes share",
    )  # fmt: skip
    files = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    try:
        options, overrides = parser.parse_known_args(argv[len(files) :])
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax launch --help") from None
        raise
    if not files:
        raise ConfigError("name a recipe first: step-jax launch RECIPE.yaml --target FILE.yaml")
    target = load_target(options.target)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # planning keeps off this machine's devices
    if flags := target.environment.get("LIBTPU_INIT_ARGS"):
        os.environ["LIBTPU_INIT_ARGS"] = flags
    loop, config = load_recipe(files, overrides, prog="step-jax launch")
    name = loop_of(files, overrides) or DEFAULT
    return Asked(loop, name, config, files[-1], target, options)


def run(asked: Asked) -> int | None:
    from step_jax.launch import fit

    options = asked.options
    job = make_job(asked.target, asked.config, asked.name, asked.recipe, options.output)
    rendered = asked.target.place.render(job)
    if options.force:
        checked = "not checked (--force)"
    else:
        checked = fit.check(
            asked.loop, asked.config, asked.target, asked.recipe, compiled=not options.dry_run
        )
    if options.dry_run:
        print(f"{rendered.text()}\n# --- checked\n# {checked}")
        return None
    print(f"checked: {checked}", flush=True)
    for name, text in rendered.files.items():
        write_whole(job.folder / name, text)
    if rendered.foreground:
        sys.stdout.flush()
        os.execvp(rendered.submit[0], rendered.submit)
    print(submit(rendered))
    print(rendered.after)
    return None


def submit(rendered: Rendered) -> str:
    """Runs the command that submits and returns what it printed.

    Raises:
      ConfigError: the command is not installed.
      StepError: it refused, with its message.
    """
    command = rendered.submit
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SUBMISSION_S)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not installed here; --dry-run prints the files and the command"
        ) from None
    except subprocess.TimeoutExpired:
        raise StepError(f"{command[0]} did not answer within {_SUBMISSION_S} s") from None
    if done.returncode:
        raise StepError(f"{command[0]} refused the job:\n{done.stderr.strip() or done.stdout}")
    return done.stdout.strip()
