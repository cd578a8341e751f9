"""Starts any command as several processes of this machine, and starts them again when that helps.

    python -m step_jax.launch.local 2 -- step-jax pretrain configs/quickstart.yaml --parallel.data 2

The processes find each other on the loopback interface through the variables that
``step_jax.core.distributed`` reads; each line that they print stands behind the number of its rank.
SIGTERM and SIGINT are passed on to all. When one fails it is named and the others are ended within
seconds. Exit codes (``step_jax.core.errors: EXITS``) say what is started again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from step_jax.core.errors import StepError
from step_jax.launch.ranks import say
from step_jax.launch.supervisor import Restarts, supervise


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m step_jax.launch.local",
        usage="%(prog)s COUNT [options] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    usual = Restarts()
    parser.add_argument("count", type=int, metavar="COUNT", help="processes")
    parser.add_argument(
        "--restarts", type=int, default=usual.budget, metavar="N",
        help=f"starts after failures in a row (default: {usual.budget})",
    )  # fmt: skip
    parser.add_argument(
        "--backoff", type=float, default=usual.backoff_s, metavar="SECONDS",
        help=f"before a start, doubled with each in a row (default: {usual.backoff_s:g})",
    )  # fmt: skip
    parser.add_argument(
        "--ledger", type=Path, metavar="FILE", help="gets a line of JSON for every start"
    )
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    command = argv[cut + 1 :]
    if args.count < 1 or not command:
        parser.error("name a number of processes and, after --, the command")
    restarts = Restarts(budget=args.restarts, backoff_s=args.backoff)
    try:
        restarts.validate()
        return supervise(command, args.count, restarts, args.ledger)
    except StepError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
