"""The ``step-jax`` command: finds the subcommand, imports only its module, turns errors into codes.

Exit codes are those of :class:`step_jax.core.errors.ExitCode`. Errors a user can act on are printed
as one message; a traceback means a bug (or ``STEP_JAX_TRACEBACK=1``).
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from step_jax.core.errors import ConfigError, ExitCode, StepError
from step_jax.trainers import LOOPS, is_file

#: besides the loops: name -> (module, help line). A module has ``parse(argv)``, which reads every
#: word and does nothing else, and ``run(asked) -> int | None``, which does what was asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("step_jax.cli.plan", "compile a recipe for a pod: memory, speed, cost"),
    "doctor": ("step_jax.cli.doctor", "examine chips, kernels and links before a run"),
    "launch": ("step_jax.cli.launch", "run a recipe on a pod, a cluster or this machine"),
    "generate": ("step_jax.cli.generate", "write text with a trained model"),
    "export": ("step_jax.cli.export", "write a decoder as Hugging Face's libraries read it"),
    "sample-video": ("step_jax.cli.sample_video", "draw pictures and clips from prompts"),
    "eval": ("step_jax.cli.evaluate", "held-out loss, perplexity and bits per byte of a model"),
    "solve": ("step_jax.cli.solve", "have a model solve problems: accuracy against tokens"),
    "problems": ("step_jax.cli.problems", "write problems of a task with their worked solutions"),
    "tokenize": ("step_jax.cli.tokenize", "make a run's token caches ahead of it, or a tokenizer"),
    "checkpoints": ("step_jax.cli.checkpoints", "list saved steps, or verify every byte of them"),
    "runs": ("step_jax.cli.runs", "compare runs as a table and a picture"),
    "ablate": ("step_jax.cli.ablate", "train variants with several seeds and compare them"),
    "sweep": ("step_jax.cli.sweep", "train with several values of a key: loss against value"),
}

_END_S = 5.0


def _help() -> str:
    entries = LOOPS | COMMANDS
    width = max(map(len, entries))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in entries.items()]
    return (
        "usage: step-jax COMMAND [FILE.yaml ...] [--group.key VALUE ...]\n\n"
        "Train the Step family of models with JAX.\n\ncommands:\n" + "\n".join(lines) + "\n"
        "  FILE.py    a training loop of your own (docs/writing_a_loop.md)\n\n"
        "step-jax COMMAND --help     every option of a command\n"
        "step-jax COMMAND --explain  every value and where it came from\n"
        "step-jax --version"
    )


def _unknown(name: str) -> ConfigError:
    import difflib

    known = [*LOOPS, *COMMANDS]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; one of: {', '.join(known)}"
    return ConfigError(f"unknown command '{name}'{hint}")


def read(argv: list[str]) -> tuple[Callable[[Any], int | None], Any]:
    """What carries a command line out, and what it is to be given; nothing is done yet.

    Raises:
      StepError: a word that is wrong, in the command or in a recipe that it names.
      SystemExit: after ``--help`` and ``--explain``.
    """
    from step_jax.core.command_line import as_word

    name, *rest = argv
    words = [as_word(word) for word in rest]  # refuses bytes that are no text
    if name in LOOPS or is_file(name):
        from step_jax.cli import loop

        return loop.run, loop.parse(name, words)
    if name not in COMMANDS:
        raise _unknown(name)
    command = importlib.import_module(COMMANDS[name][0])
    return command.run, command.parse(words)


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
        code = _carried_out(argv)
    except BaseException:
        _end_soon(ExitCode.FAILURE)
        raise
    # what the processes of a run agreed on, they end together
    if code not in (ExitCode.OK, ExitCode.RESTART, ExitCode.INTERRUPTED):
        _end_soon(code)
    return code


def _end_soon(code: int) -> None:
    """Ends this process with the code in five seconds, if it is one of several.

    The others may not know that it is to end, and at its end JAX waits for them, for minutes.
    """
    distributed = getattr(sys.modules.get("jax"), "distributed", None)
    if distributed is None or not distributed.is_initialized():
        return
    from step_jax.runs import exit_timer

    if exit_timer.available():
        exit_timer.CTimer("_exit", code).set(_END_S)


def _carried_out(argv: list[str]) -> int:
    """The exit code of a command, which it is told of in words."""
    try:
        with _signals_of_a_loop(argv[0]):
            run, asked = read(argv)
            return run(asked) or ExitCode.OK
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


@contextmanager
def _signals_of_a_loop(name: str) -> Iterator[None]:
    """A loop that is stopped before its run is open, while it is imported, wants to be restarted.

    The first process of a container does not even end of a SIGTERM that it does not catch. It ends
    at once: an exception amid an import may come out as another one, or as a package that is not
    there. SIGUSR1, which asks for a profile, does not end what has no step to trace yet.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or not (name in LOOPS or is_file(name)):
        yield
        return

    def stop(*_: object) -> None:
        os.write(2, b"step-jax: stopped before it began: start the same command to go on\n")
        os._exit(ExitCode.RESTART)

    before = signal.signal(signal.SIGTERM, stop)
    asked_before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, asked_before)


def _report(message: str, code: int) -> int:
    print(f"step-jax: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
