"""Errors a user can act on, and the exit codes that a launcher acts on.

Every message says what is wrong and what to do about it; the command line prints
the message without a traceback and exits with the code of the error.
"""

from __future__ import annotations


class ExitCode:
    """Process exit codes. A scheduler restarts a job only on ``RESTART`` and ``HANG``."""

    OK = 0
    FAILURE = 1
    RESTART = 42  # state saved (preemption): start the same command again
    DISK_FULL = 73  # EX_CANTCREAT of sysexits.h
    HANG = 75  # EX_TEMPFAIL of sysexits.h
    CONFIG = 78  # EX_CONFIG of sysexits.h: never restart, the input must change
    INTERRUPTED = 130  # 128 + SIGINT


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


class DiskFullError(StepError, OSError):
    """No space is left for a file that the run cannot do without."""

    exit_code = ExitCode.DISK_FULL


class RestartRequested(StepError):
    """The run saved its state and wants to be started again (preemption)."""

    exit_code = ExitCode.RESTART


class HangError(StepError, RuntimeError):
    """No progress within the allowed time."""

    exit_code = ExitCode.HANG
