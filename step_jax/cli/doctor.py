"""``step-jax doctor [FILE.yaml ...] [--aot TOPOLOGY] [--json] [--group.key VALUE ...]``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.cli.arguments import load_recipe
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.trainers import DEFAULT, Loop


@dataclass(frozen=True)
class Asked:
    """A loop with its configuration, None without a recipe, its name, and our own options."""

    loop: Loop | None
    config: Any
    recipe: str
    options: argparse.Namespace


def parse(argv: list[str]) -> Asked:
    files = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    options, overrides = _options(argv[len(files) :])
    if options.aot:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not files:
        if overrides:
            raise ConfigError(
                f"{overrides[0]} changes a recipe, and none is named before it: "
                "step-jax doctor FILE.yaml ..."
            )
        if options.aot:
            raise ConfigError("--aot compiles the kernels of a recipe: name one before it")
        return Asked(None, None, "", options)
    loop, config = load_recipe(files, overrides, prog="step-jax doctor")
    return Asked(loop, config, Path(files[-1]).stem, options)


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="step-jax doctor",
        usage="step-jax doctor [FILE.yaml ...] [--aot TOPOLOGY] [--json] [--group.key VALUE ...]",
        description="Examine this machine, or every host of a pod that the command is given on: "
        "versions, devices, links, and each kernel that the recipe will be computed with: whether "
        "it compiles, is right and repeatable, and how fast it is. Exit code 1 if anything is "
        f"wrong. A recipe is of the loop that its key `loop` names ({DEFAULT} without one).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--aot", metavar="TOPOLOGY", help="only compile, for a pod that is not here: v5p:4x4x4"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    try:
        return parser.parse_known_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax doctor --help") from None
        raise


def run(asked: Asked) -> int:
    import jax

    from step_jax.core import distributed, hardware
    from step_jax.planning import doctor, topology
    from step_jax.runs.console import make_console

    if asked.options.aot:
        there = topology.parse(asked.options.aot)
        subject = _subject(asked, there.devices)
        if subject is None:
            raise ConfigError(f"{asked.recipe} trains no decoder on texts: it has no kernels")
        report = doctor.compiled_for(asked.recipe, asked.config, subject, there)
    else:
        distributed.join(asked.config.parallel.multihost if asked.config else False)
        hardware.leave_out_absent_tpus()
        report = doctor.examine(asked.recipe, asked.config, _subject(asked, None))
    if jax.process_index() == 0:
        if asked.options.json:
            print(json.dumps(report.plain(), indent=1))
        else:
            console = make_console(every=1)
            doctor.show(report, console)
            console.close()
    return ExitCode.FAILURE if report.failures else ExitCode.OK


def _subject(asked: Asked, devices):
    from step_jax.planning import doctor

    if asked.loop is None:
        return None
    return doctor.subject_of(asked.loop, asked.config, devices)
