"""Errors a user can act on, and the exit codes that a launcher acts on.

Every message says what is wrong and what to do about it; the command line prints
the message without a traceback and exits with the code of the error.
"""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass
from typing import Literal


class ExitCode:
    """Process exit codes; ``EXITS`` says what they mean and what a launcher does about them."""

    OK = 0
    FAILURE = 1
    RESTART = 42
    DISK_FULL = 73  # EX_CANTCREAT of sysexits.h
    HANG = 75  # EX_TEMPFAIL of sysexits.h
    CONFIG = 78  # EX_CONFIG of sysexits.h
    ABORTED = 128 + signal.SIGABRT
    INTERRUPTED = 128 + signal.SIGINT
    KILLED = 128 + signal.SIGKILL
    TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Exit:
    """What an exit code says.

    again: whether a launcher starts the command again: ``free`` as often as it comes, ``counted``
      out of a budget, ``never`` because the same would come of it.
    """

    meaning: str
    again: Literal["free", "counted", "never"]


#: The only table of exit codes: every launcher goes by it, and docs/pods.md shows it. A code above
#: 128 that is not in it is a signal's and counts as ``LOST``.
EXITS: dict[int, Exit] = {
    ExitCode.OK: Exit("finished", "never"),
    ExitCode.FAILURE: Exit("an error that the message names", "never"),
    ExitCode.RESTART: Exit("the state is saved: start the same command again", "free"),
    ExitCode.DISK_FULL: Exit("the disk is full", "never"),
    ExitCode.HANG: Exit("a hang: the stacks of all threads are in the output", "counted"),
    ExitCode.CONFIG: Exit("the configuration or the input must change", "never"),
    ExitCode.INTERRUPTED: Exit("Ctrl-C", "never"),
    ExitCode.ABORTED: Exit("another process or its machine was lost", "counted"),
    ExitCode.KILLED: Exit("killed: by hand, after a grace, or for want of host memory", "counted"),
    ExitCode.TERMINATED: Exit("ended by a second SIGTERM, or before it could save", "counted"),
}
LOST = Exit("ended by a signal", "counted")


def exit_of(code: int) -> Exit:
    """What an exit code says, in the shell's form: 128 + n for signal n."""
    return EXITS.get(code, LOST if code > 128 else EXITS[ExitCode.FAILURE])


class StepError(Exception):
    """Base of the errors that are reported as one message without a traceback."""

    exit_code: int = ExitCode.FAILURE


class ConfigError(StepError, ValueError):
    """The configuration is wrong; restarting does not help."""

    exit_code = ExitCode.CONFIG


class DataError(StepError, ValueError):
    """The data on disk is missing, unreadable, or does not fit the configuration."""


class CheckpointError(StepError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class KernelError(StepError, RuntimeError):
    """A kernel that was asked for by name computes wrong numbers on these devices."""


class DiskFullError(StepError, OSError):
    """No space is left for a file that the run cannot do without."""

    exit_code = ExitCode.DISK_FULL


class StorageError(StepError, RuntimeError):
    """An object store does not answer, or refuses for the time being."""


class TakenOverError(StepError, RuntimeError):
    """Another job has the run directory by now; started again, this one would be refused."""


class RestartRequested(StepError):
    """The run saved its state and wants to be started again (preemption)."""

    exit_code = ExitCode.RESTART


class HangError(StepError, RuntimeError):
    """No progress within the allowed time."""

    exit_code = ExitCode.HANG


class PeerLostError(StepError, RuntimeError):
    """Another process of the run, or its machine, is gone."""

    exit_code = ExitCode.ABORTED


def kind_of(error: BaseException, default: type[StepError] = StepError) -> str:
    """The name under which a failure travels to other processes and threads.

    That of its class, ``DiskFullError`` for whatever a full disk caused, and ``default``'s for what
    is no StepError.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFullError.__name__
        # TensorStore reports the operating system's error as text only.
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return DiskFullError.__name__
        seen = seen.__cause__ or seen.__context__
    return (type(error) if isinstance(error, StepError) else default).__name__


def from_kind(kind: str, message: str) -> StepError:
    """The exception for a failure that another process or thread reported."""

    def classes(cls: type[StepError]):
        yield cls
        for subclass in cls.__subclasses__():
            yield from classes(subclass)

    return next((cls for cls in classes(StepError) if cls.__name__ == kind), StepError)(message)
