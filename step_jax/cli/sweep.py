"""``step-jax sweep RECIPE --vary KEY=VALUE,... [--vary ...] [--seeds N] [flags]``."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """Files of a recipe, our own options, and flags for every run."""

    files: list[str]
    options: argparse.Namespace
    overrides: list[str]

    def varied(self):
        from step_jax.trainers.variants import Values

        return [Values.parse(words, "--vary") for words in self.options.vary]


def run(asked: Asked) -> None:
    from step_jax.trainers.sweep import run_sweep

    result = run_sweep(asked.files, asked.varied(), range(asked.options.seeds), asked.overrides)
    print(f"\n{result.markdown()}\ntable:   {result.table} (and .json)\npicture: {result.picture}")


def parse(argv: list[str]) -> Asked:
    parser = argparse.ArgumentParser(
        prog="step-jax sweep",
        usage="step-jax sweep RECIPE.yaml --vary KEY=VALUE,... [options] [--group.key VALUE ...]",
        description="Train a pretraining recipe with several values of a key and draw the held-out "
        "loss against them. Start it again to go on where it stopped. --group.key VALUE changes "
        "every run; `step-jax pretrain RECIPE.yaml --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--vary",
        action="append",
        metavar="KEY=VALUE,...",
        help="as in optimizer.learning_rate=1e-3,3e-3,1e-2; of several keys every combination",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="0 to N-1 (default: 1)")
    files = list(itertools.takewhile(lambda item: not item.startswith("-"), argv))
    try:
        args, overrides = parser.parse_known_args(argv[len(files) :])
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax sweep --help") from None
        raise
    if not files:
        raise ConfigError("name a recipe before the options: step-jax sweep RECIPE.yaml --vary ...")
    if not args.vary:
        raise ConfigError("say what to vary, as in --vary optimizer.learning_rate=1e-3,3e-3,1e-2")
    if args.seeds < 1:
        raise ConfigError(f"--seeds is {args.seeds}; it must be at least 1")
    return Asked(files, args, overrides)
