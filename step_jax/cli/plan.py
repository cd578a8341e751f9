"""``step-jax plan FILE.yaml --topology v5p:8x8x16 [options] [--group.key VALUE ...]``."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.cli.arguments import load_recipe
from step_jax.core.errors import ConfigError
from step_jax.trainers import DEFAULT, Loop


@dataclass(frozen=True)
class Asked:
    """A loop, its configuration, the recipe's name, the flags that changed it, our own options, and
    the command as it was given.

    Of a comparison there are options alone.
    """

    loop: Loop | None
    config: Any
    recipe: str
    flags: tuple[str, ...]
    options: argparse.Namespace
    command: str


def parse(argv: list[str]) -> Asked:
    files, options, overrides = _split(argv)
    command = shlex.join(["step-jax", "plan", *argv])
    if options.compare:
        return Asked(None, None, "", (), options, command)
    _before_jax(options.topology or "")
    loop, config = load_recipe(files, overrides, prog="step-jax plan")
    return Asked(loop, config, Path(files[-1]).stem, tuple(overrides), options, command)


def run(asked: Asked) -> None:
    from step_jax.planning import compare, page, report
    from step_jax.planning import topology as topology_lib
    from step_jax.planning.changes import with_changes
    from step_jax.planning.plan import make_plan
    from step_jax.runs.console import make_console
    from step_jax.runs.device_memory import DoesNotFit

    args = asked.options
    console = make_console(every=1)
    if asked.loop is None:
        first, second = args.compare
        compare.show(first, second, console)
        console.close()
        return
    if args.topology is None:
        raise ConfigError(f"say where: --topology NAME; there are:\n{topology_lib.describe_all()}")
    topology = topology_lib.parse(args.topology, args.slices)
    if args.serve:
        _serve(asked, topology, console)
        return
    if args.search or topology.on_paper:
        _search(asked, topology, console)
        return
    plan = make_plan(asked.loop, asked.config, topology, _request(asked))
    plan = with_changes(plan, asked.loop, asked.config, topology)
    report.show(plan, console)
    name = _file_name(asked, topology)
    plan.save(args.output / f"{name}.json")
    picture = report.draw(plan, args.output / f"{name}.png")
    looked_at = page.write(plan, args.output / f"{name}.html", asked.command)
    console.line(f"saved: {args.output / name}.json, {picture}, {looked_at}")
    console.close()
    if not plan.fits and not args.force:
        raise DoesNotFit(
            f"{asked.recipe} does not fit a device of {topology.name}: {plan.misfit} "
            "(--force for exit code 0 all the same; --search looks for what fits)"
        )


def _request(asked: Asked):
    """What a plan is told beside configuration and topology."""
    from step_jax.planning.plan import Request

    price, currency = asked.options.price or (None, None)
    return Request(asked.recipe, asked.flags, price, currency)


def _search(asked: Asked, topology, console) -> None:
    from step_jax.planning import search

    args, request = asked.options, _request(asked)
    assert asked.loop is not None
    found = search.search(asked.loop, asked.config, topology, request, compiled=args.search)
    search.show(found, topology, console)
    path = args.output / f"{_file_name(asked, topology)}_search.json"
    search.save(found, topology, request, path)
    console.line(f"saved: {path}, {path.with_suffix('.md')}")
    console.close()


def _serve(asked: Asked, topology, console) -> None:
    from step_jax.planning import serving
    from step_jax.runs.device_memory import DoesNotFit

    args = asked.options
    assert asked.loop is not None
    sizes = {"prompt": args.prompt, "length": args.length, "slots": args.slots}
    plan = serving.make_serving(asked.loop, asked.config, topology, asked.recipe, **sizes)
    serving.show(plan, console)
    path = args.output / f"{_file_name(asked, topology)}_serving.json"
    plan.save(path)
    console.line(f"saved: {path}")
    console.close()
    if not plan.fits and not args.force:
        raise DoesNotFit(f"{asked.recipe} does not fit {topology.name} with {plan.slots} slots")


#: Longer names of files are cut and end with a digest instead.
_LONGEST = 120


def _file_name(asked: Asked, topology) -> str:
    """Of recipe, topology and flags, so that no plan overwrites another's file."""
    parts = [asked.recipe, topology.name, *(flag.removeprefix("--") for flag in asked.flags)]
    name = re.sub(r"[^\w.-]+", "_", "_".join(parts))
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _price(text: str) -> tuple[float, str]:
    """Amount and currency of a price such as ``4.2USD``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z$€£¥]+)(?:/chip-hour)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no price of a chip-hour with its unit, such as 4.2USD"
        )
    return float(found[1]), found[2]


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
    parser.add_argument(
        "--price", type=_price, metavar="4.2USD", help="of a chip-hour: what the run costs"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="two saved plans"
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
    if not files and not args.compare:
        raise ConfigError(
            "name a recipe before the options: step-jax plan FILE.yaml --topology ..."
        )
    return files, args, overrides
