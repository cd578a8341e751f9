"""``step-jax ablate DIR_OR_FILE.yaml ... [--seeds N] [--search KEY=VALUE,...] [flags]``."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """Files or folders of variants, our own options, and flags for every variant."""

    paths: list[str]
    options: argparse.Namespace
    overrides: list[str]


def run(asked: Asked) -> None:
    from step_jax.trainers.ablation import run_ablation
    from step_jax.trainers.variants import Values

    options = asked.options
    result = run_ablation(
        asked.paths,
        range(options.seeds),
        asked.overrides,
        options.reference,
        None if options.search is None else Values.parse(options.search, "--search"),
        options.rounds,
    )
    print(f"\n{result.markdown()}\ntable:   {result.table}\npicture: {result.picture}")


def parse(argv: list[str]) -> Asked:
    parser = argparse.ArgumentParser(
        prog="step-jax ablate",
        usage="step-jax ablate DIR_OR_FILE.yaml ... [options] [--group.key VALUE ...]",
        description="Train variants of a pretraining recipe with several seeds and compare their "
        "held-out losses, parameters, cache sizes and times. They may differ in any part of the "
        "recipe but tokens, tokenizer and held-out documents. Start it again to go on where it "
        "stopped. "
        "--group.key VALUE changes every variant; `step-jax pretrain FILE.yaml --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N-1 (default: 3)")
    parser.add_argument("--reference", metavar="NAME", help="compare with it (default: the first)")
    parser.add_argument(
        "--search",
        metavar="KEY=VALUE,...",
        help="give each variant the best of these values by its loss of seed 0, as in "
        "optimizer.learning_rate=1e-3,3e-3,1e-2",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="in which a step and a decoded token of each variant are timed (default: 5; 0: none)",
    )
    paths = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    try:
        args, overrides = parser.parse_known_args(argv[len(paths) :])
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax ablate --help") from None
        raise
    if not paths:
        raise ConfigError("name a directory of configurations, or files, before the options")
    if args.seeds < 1:
        raise ConfigError(f"--seeds is {args.seeds}; it must be at least 1")
    if args.rounds < 0:
        raise ConfigError(f"--rounds is {args.rounds}; it must be 0 or more")
    return Asked(paths, args, overrides)
