"""One run, one directory: the lock, what a killed owner leaves, the stored configuration."""

import os
import signal
import subprocess
import sys

import pytest

from step_jax.core.errors import ConfigError, ExitCode
from step_jax.core.files import write_whole
from step_jax.runs.folder_lock import is_locked
from step_jax.runs.run_directory import RunDirectory

OWNER = """
import os, sys, time
from step_jax.runs.run_directory import RunDirectory
with RunDirectory(sys.argv[1]):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start_owner():
    started = []

    def start(path, *words):
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(path), *words], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        line = process.stdout.readline()
        assert line, "the owner did not start"
        return process, int(line)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_second_run_is_refused_and_told_who_has_the_directory(tmp_path, start_owner):
    owner, _ = start_owner(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path / "run").__enter__()
    message = str(caught.value)
    assert f"in use by process {owner.pid} on {os.uname().nodename} since" in message
    assert caught.value.exit_code == ExitCode.CONFIG
    assert is_locked(tmp_path / "run")


def test_a_killed_owner_is_replaced_even_if_its_children_live(tmp_path, start_owner):
    owner, child = start_owner(tmp_path / "run", "fork")
    try:
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # the child is there
        assert not is_locked(tmp_path / "run")
        with RunDirectory(tmp_path / "run") as run:
            assert str(os.getpid()) in (run.path / "lock").read_text()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_owner_itself_cannot_enter_twice(tmp_path, start_owner):
    with RunDirectory(tmp_path) as run:
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            RunDirectory(tmp_path).__enter__()
        # The refusal did not drop the lock: another process is still refused.
        code = "import sys; from step_jax.runs.folder_lock import is_locked\n"
        code += "sys.exit(not is_locked(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not is_locked(tmp_path)
    with run:
        pass


def test_other_processes_of_a_run_neither_lock_nor_write(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path, primary=False) as run:
        run.write_config("a: 1\n")
    assert not path.exists()


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the run directory .*file"):
        RunDirectory(tmp_path / "file").__enter__()


def test_configurations_are_kept(tmp_path):
    with RunDirectory(tmp_path) as run:
        for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
            run.write_config(text)
    names = ("config.1.yaml", "config.2.yaml", "config.yaml")
    assert [(tmp_path / n).read_text() for n in names] == ["a: 1\n", "a: 2\n", "a: 3\n"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "identity", "lock"])


def test_write_whole_leaves_the_old_text_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_whole(path, "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
