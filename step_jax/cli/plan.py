"""``step-jax plan FILE.yaml --topology v5p:8x8x16 [options] [--group.key VALUE ...]``."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.cli.arguments import load_recipe
from step_jax.core.errors import ConfigError
from step_jax.trainers import DEFAULT, Loop


@dataclass(frozen=True)
class Asked:
    """A loop, its configuration, the recipe's name and our own options."""

    loop: Loop
    config: Any
    recipe: str
    options: argparse.Namespace


def parse(argv: list[str]) -> Asked:
    files, options, overrides = _split(argv)
    _before_jax(options.topology or "")
    loop, config = load_recipe(files, overrides, prog="step-jax plan")
    return Asked(loop, config, Path(files[-1]).stem, options)


def run(asked: Asked) -> None:
    from step_jax.planning import report, search
    from step_jax.planning import topology as topology_lib
    from step_jax.planning.plan import make_plan
    from step_jax.runs.console import make_console
    from step_jax.runs.device_memory import DoesNotFit

    loop, config, recipe, args = asked.loop, asked.config, asked.recipe, asked.options
    if args.topology is None:
        raise ConfigError(f"say where: --topology NAME; there are:\n{topology_lib.describe_all()}")
    topology = topology_lib.parse(args.topology, args.slices)
    console = make_console(every=1)
    if args.serve:
        _serve(asked, topology, console)
        return
    if args.search or topology.on_paper:
        found = search.search(loop, config, topology, compiled=args.search)
        search.show(found, topology, console)
        console.close()
        return
    plan = make_plan(loop, config, topology, recipe)
    report.show(plan, console)
    name = _file_name(recipe, topology)
    plan.save(args.output / f"{name}.json")
    picture = report.draw(plan, args.output / f"{name}.png")
    console.line(f"saved: {picture.with_suffix('.json')}, {picture}")
    console.close()
    if plan.memory_limit is not None and not plan.fits and not args.force:
        raise DoesNotFit(
            f"{recipe} needs {report.gigabytes(plan.memory_compiler)} of the "
            f"{report.gigabytes(plan.memory_limit)} of a device of {topology.name} "
            "(--force for exit code 0 all the same; --search looks for what fits)"
        )


def _serve(asked: Asked, topology, console) -> None:
    from step_jax.planning import serving
    from step_jax.runs.device_memory import DoesNotFit

    args = asked.options
    sizes = {"prompt": args.prompt, "length": args.length, "slots": args.slots}
    plan = serving.make_serving(asked.loop, asked.config, topology, asked.recipe, **sizes)
    serving.show(plan, console)
    path = args.output / f"{_file_name(asked.recipe, topology)}_serving.json"
    plan.save(path)
    console.line(f"saved: {path}")
    console.close()
    if not plan.fits and not args.force:
        raise DoesNotFit(f"{asked.recipe} does not fit {topology.name} with {plan.slots} slots")


def _file_name(recipe: str, topology) -> str:
    return f"{recipe}_{topology.name.replace(':', '_').replace(' ', '_')}"


def _before_jax(topology: str) -> None:
    """Keeps the plan off real accelerators, and simulates the devices of ``cpu:N``."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    kind, _, count = topology.partition(":")
    flag = "--xla_force_host_platform_device_count"
    if kind == "cpu" and count.isdigit() and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()


def _split(argv: list[str]) -> tuple[list[str], argparse.Namespace, list[str]]:
    """(configuration files, our options, flags of the configuration)."""
    parser = argparse.ArgumentParser(
        prog="step-jax plan",
        usage="step-jax plan FILE.yaml --topology NAME [options] [--group.key VALUE ...]",
        description="Compile the train step of a recipe, of the loop that its key `loop` names "
        f"({DEFAULT} without one), for a pod on this machine's CPU, and say whether it fits, how "
        "fast it can go and what limits it. --group.key VALUE changes the recipe; "
        "`step-jax LOOP FILE.yaml --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", metavar="NAME", help="v5p:8x8x16, tpu7x:4x4x4, cpu:8, ...")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="pods of that shape")
    parser.add_argument(
        "--search", action="store_true", help="propose mesh, remat and microbatches that fit"
    )
    parser.add_argument(
        "--serve", action="store_true", help="plan reading prompts and writing text instead"
    )
    parser.add_argument("--prompt", type=int, default=4000, metavar="T", help="tokens (--serve)")
    parser.add_argument(
        "--length", type=int, default=32768, metavar="T", help="of a text, at most (--serve)"
    )
    parser.add_argument(
        "--slots", type=int, default=0, metavar="N", help="texts at a time; 0: what fits (--serve)"
    )
    parser.add_argument("--force", action="store_true", help="a plan that does not fit is no error")
    parser.add_argument("--output", type=Path, default=Path("plans"), metavar="DIR")
    files = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    try:
        args, overrides = parser.parse_known_args(argv[len(files) :])
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax plan --help") from None
        raise
    if not files:
        raise ConfigError(
            "name a recipe before the options: step-jax plan FILE.yaml --topology ..."
        )
    return files, args, overrides
