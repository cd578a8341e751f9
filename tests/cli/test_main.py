"""The ``step-jax`` command: cheap help, exit codes, one message and no traceback."""

import errno
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
import types

import pytest

from step_jax.cli import loop
from step_jax.cli import main as cli
from step_jax.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExitCode,
    RestartRequested,
)
from step_jax.launch import ranks


def test_help_is_cheap():
    """The bar is 0.5 CPU-s; the margin keeps the test steady on a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "step_jax", "--help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert all(name in out for name in cli.COMMANDS)
    assert seconds < 0.5


def test_every_command_has_a_module():
    for module, _ in cli.COMMANDS.values():
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("wrong key"), 78),
        (RestartRequested("saved at step 3"), 42),
        (OSError(errno.ENOSPC, "No space left on device"), 73),
        (DataError("no text"), 1),
        (CheckpointError("damaged"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def run(argv):
        assert argv == ["x.yaml"]
        if error is not None:
            raise error

    monkeypatch.setitem(sys.modules, "fake", types.SimpleNamespace(parse=list, run=run))
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake", ""))
    assert cli.main(["fake", "x.yaml"]) == code
    printed = capsys.readouterr().err
    if isinstance(error, ConfigError | DataError):
        assert printed == f"step-jax: {error}\n"


def test_bugs_keep_their_traceback(monkeypatch):
    def run(argv):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "fake", types.SimpleNamespace(parse=list, run=run))
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake", ""))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_code_of_a_command_is_passed_on(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "fake", types.SimpleNamespace(parse=list, run=lambda asked: 42)
    )
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake", ""))
    assert cli.main(["fake"]) == 42


def test_unknown_command(capsys):
    assert cli.main(["pretran"]) == 78
    assert capsys.readouterr().err == (
        "step-jax: unknown command 'pretran'; did you mean 'pretrain'?\n"
    )
    assert cli.main([]) == 78
    assert cli.main(["--version"]) == 0


def test_every_export_resolves():
    import step_jax

    for name in step_jax.__all__:
        assert getattr(step_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        step_jax.Trainer  # noqa: B018


def test_sigterm_while_a_loop_is_being_read_asks_for_a_restart(tmp_path):
    """Whatever an import makes of exceptions; and a wish for a profile, which there is nothing of
    yet, ends nothing."""
    code = """
import os, signal, sys
from step_jax.cli import loop, main
def read_and_be_stopped(name, words):
    os.kill(os.getpid(), signal.SIGUSR1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        [i for i in range(10**6)]
    except Exception:
        raise ImportError("initializing the extension")
loop.parse = read_and_be_stopped
sys.exit(main.main(["pretrain", "x.yaml"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.RESTART, done.stderr
    assert "stopped before it began" in done.stderr


def test_the_signal_handlers_of_a_command_are_put_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "parse", lambda name, words: None)
    monkeypatch.setattr(loop, "run", lambda asked: None)
    assert cli.main(["pretrain", "x.yaml"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


ALONE = """
import os, sys, time
from step_jax.cli import main
from step_jax.core import distributed
from step_jax.core.errors import ConfigError

def run(asked):
    distributed.join()
    if os.environ["JAX_PROCESS_ID"] == "0":
        time.sleep(60)
    raise {"ValueError": ValueError, "ConfigError": ConfigError}[sys.argv[1]]("it alone")

main._END_S = 0.5
main.read = lambda argv: (run, None)
sys.exit(main.main(["a command"]))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("error", "code"), [("ValueError", 1), ("ConfigError", 78)])
def test_a_process_that_fails_alone_waits_for_nobody(error, code, capfd):
    """And so the launcher ends the others within seconds, not after JAX's five minutes."""
    began = time.monotonic()
    outcome = ranks.run([sys.executable, "-c", ALONE, error], 2, ranks.Signals(), os.environ)
    assert (outcome.code, outcome.culprit) == (code, 1)
    assert time.monotonic() - began < 30
    assert "it alone" in capfd.readouterr().err
