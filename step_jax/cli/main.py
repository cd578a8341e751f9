"""The ``step-jax`` command: finds the subcommand, imports only its module, turns errors into codes.

Exit codes are those of :class:`step_jax.core.errors.ExitCode`. Errors a user can act on are printed
as one message; a traceback means a bug (or ``STEP_JAX_TRACEBACK=1``).
"""

from __future__ import annotations

import errno
import importlib
import os
import sys

from step_jax.core.errors import ConfigError, ExitCode, StepError

#: name -> (module with ``main(argv) -> int | None``, help line)
COMMANDS: dict[str, tuple[str, str]] = {
    "pretrain": ("step_jax.cli.pretrain", "train a language model from a configuration file"),
    "plan": ("step_jax.cli.plan", "compile a recipe for a pod: memory, speed, cost"),
    "reinforce": ("step_jax.cli.reinforce", "toy: a decoder learns to sort by policy gradients"),
    "flow-matching": ("step_jax.cli.flow_matching", "toy: draw digits by class"),
    "generate": ("step_jax.cli.generate", "write text with a trained model"),
    "eval": ("step_jax.cli.evaluate", "held-out loss, perplexity and bits per byte of a model"),
    "tokenize": ("step_jax.cli.tokenize", "train a tokenizer, or look at what one does"),
    "checkpoints": ("step_jax.cli.checkpoints", "list saved steps, or verify every byte of them"),
    "runs": ("step_jax.cli.runs", "compare runs as a table and a picture"),
    "ablate": ("step_jax.cli.ablate", "train variants with several seeds and compare them"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: step-jax COMMAND [FILE.yaml ...] [--group.key VALUE ...]\n\n"
        "Train the Step family of models with JAX.\n\ncommands:\n" + "\n".join(lines) + "\n\n"
        "step-jax COMMAND --help     every option of a command\n"
        "step-jax COMMAND --explain  every value and where it came from\n"
        "step-jax --version"
    )


def _unknown(name: str) -> ConfigError:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; one of: {', '.join(COMMANDS)}"
    return ConfigError(f"unknown command '{name}'{hint}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: ``sys.argv[1:]``) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return ExitCode.OK if argv else ExitCode.CONFIG
    if argv[0] in ("-V", "--version"):
        from step_jax import __version__

        print(f"step-jax {__version__}")
        return ExitCode.OK
    try:
        if argv[0] not in COMMANDS:
            raise _unknown(argv[0])
        from step_jax.core.command_line import as_word

        words = [as_word(word) for word in argv[1:]]  # refuses bytes that are no text
        module = importlib.import_module(COMMANDS[argv[0]][0])
        return module.main(words) or ExitCode.OK
    except StepError as error:
        if os.environ.get("STEP_JAX_TRACEBACK"):
            raise
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted", ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `step-jax runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _report(f"disk full: {error}", ExitCode.DISK_FULL)


def _report(message: str, code: int) -> int:
    print(f"step-jax: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
