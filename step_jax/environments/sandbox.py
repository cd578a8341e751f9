"""Programs that nobody has read, run in a sandbox of bubblewrap.

What a program gets: its own text and its standard input; the interpreter and the C library,
read-only; an empty folder in memory; no network, no file of the host, no name of a process outside.
Its limits are set before its first line, and what is left of it when it ends or its time is up is
killed with its process namespace. Expected answers are compared outside: they never enter.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import resource
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.environments import system_calls
from step_jax.environments.processes import end_tree

End = Literal["exit", "signal", "timeout", "output"]

_GUARD = Path(__file__).with_name("sandbox_guard.py")
#: user ids of the host that no account has; each sandbox of a host's root gets one of its own
_FIRST_USER = 2**30
_PYTHON = "/python"  # where the interpreter stands inside; its place outside may name somebody
_RUNS = itertools.count()
_LAST_SECONDS = 1.0  # for pipes to close behind a program that has ended
_INSTALL = "install the package bubblewrap (apt install bubblewrap)"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds: of the clock.
    cpu_seconds: of each process, rounded up to whole ones.
    memory_mib: address space of each process.
    processes: at a time, threads included; all of them together may use that many times the memory.
    file_mib: of a file, and of all files together.
    output_bytes: of standard output, and of standard error.
    """

    seconds: float = 5.0
    cpu_seconds: float = 5.0
    memory_mib: int = 512
    processes: int = 1
    file_mib: int = 16
    output_bytes: int = 65536

    def validate(self):
        checks.above(self, seconds=0, cpu_seconds=0)
        checks.at_least(self, memory_mib=64, processes=1, file_mib=1, output_bytes=1)


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    end: ``exit`` (by itself, with ``code``), ``signal`` (``code`` is its number), ``timeout``, or
      ``output`` (it wrote too much).
    out, err: what it wrote, as far as it was allowed to; not UTF-8 stands as U+FFFD.
    seconds: of the clock, start included.
    """

    end: End
    code: int
    out: str
    err: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.end == "exit" and self.code == 0


def run(program: str, stdin: str = "", limits: Limits = Limits(), function: str = "") -> Ran:
    """Runs a Python program (of the standard library only) in a sandbox of its own.

    Args:
      function: of the program, to be called with the JSON list on ``stdin``; its result is ``out``,
        as JSON. Without it the program is run as it stands.

    Raises:
      ConfigError: there is no sandbox to be had here; the message says what would do.
      RuntimeError: the sandbox could not be made this time.
    """
    require(limits.memory_mib)
    ran = _run(program, stdin, limits, function)
    if ran.end == "exit" and ran.code == 1 and ran.err.startswith("bwrap: "):
        raise RuntimeError(ran.err)
    return ran


@functools.cache
def require(memory_mib: int = 0) -> None:
    """Raises `ConfigError` unless programs can be run in a sandbox of so much memory here."""
    if sys.platform != "linux":
        raise ConfigError(f"the sandbox is bubblewrap's, which {sys.platform} does not have")
    if shutil.which("bwrap") is None:
        raise ConfigError(f"the sandbox is bubblewrap's, and there is no bwrap here: {_INSTALL}")
    options = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    if lacking := [option for option in ("--disable-userns", "--size") if option not in options]:
        raise ConfigError(f"this bubblewrap is older than 0.8 and lacks {lacking[0]}: {_INSTALL}")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY and memory_mib * 2**20 > hard:
        raise ConfigError(
            f"a program may use {memory_mib} MiB (memory_mib of its limits), and this process only "
            f"{hard // 2**20}: raise workers.memory_mib, or ask for less"
        )
    ran = _run("print('ready')", "", Limits(seconds=30), "")
    if not ran.good or ran.out != "ready\n":
        raise ConfigError(
            f"bubblewrap cannot make a sandbox here ({ran.err.strip() or ran.end}). User "
            "namespaces must be allowed: user.max_user_namespaces above 0; on Ubuntu 24.04 a "
            "profile of AppArmor for bwrap (kernel.apparmor_restrict_unprivileged_userns); in a "
            "container --security-opt seccomp=unconfined, or another profile that has them"
        )


def _run(program: str, stdin: str, limits: Limits, function: str) -> Ran:
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        files = {
            "/box/program.py": _handed(stack, program),
            "/box/guard.py": _handed(stack, _GUARD.read_bytes()),
        }
        calls = _handed(stack, system_calls.denied())
        process = subprocess.Popen(
            [*_bubblewrap(files, calls, limits), *_guarded(limits), function],
            stdin=_handed(stack, stdin),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(*files.values(), calls),
            env={"PATH": os.environ.get("PATH", os.defpath)},
            cwd="/",
            start_new_session=True,
        )
        try:
            out, err, end = _gather(process, begun + limits.seconds, limits.output_bytes)
        finally:
            end_tree(process.pid)
            code = process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
    ended: End = end or ("signal" if code > 128 else "exit")
    if end is not None:
        code = 0
    said, errors = (data.decode("utf-8", "replace") for data in (out, err))
    number = code - 128 if ended == "signal" else code
    return Ran(ended, number, said, errors, time.monotonic() - begun)


def _handed(stack: contextlib.ExitStack, content: str | bytes) -> int:
    """A descriptor to read the content from; the file behind it has no name."""
    descriptor = os.memfd_create("box")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _bubblewrap(files: Mapping[str, int], calls: int, limits: Limits) -> list[str]:
    """The command up to the program: what is seen and what is shared with the host."""
    command = [
        "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv",
        "--hostname", "sandbox", "--setenv", "HOME", "/work", "--setenv", "TMPDIR", "/work",
        "--setenv", "LC_ALL", "C.UTF-8", "--cap-drop", "ALL",
    ]  # fmt: skip
    if _is_root():  # the guard changes the user, which a namespace of one user would not let it
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    command += ["--perms", "0755", "--dir", "/usr"]  # made on the way, it would be root's alone
    for folder in ("/usr/lib", "/usr/lib64", "/usr/lib32"):
        command += ["--ro-bind-try", folder, folder]
    for link in ("/lib", "/lib64", "/lib32"):
        if os.path.islink(link):
            command += ["--symlink", os.readlink(link), link]
        else:
            command += ["--ro-bind-try", link, link]
    prefix, interpreter = _python()
    if prefix != "/usr":
        command += ["--ro-bind", prefix, _PYTHON, "--setenv", "LD_LIBRARY_PATH", f"{_PYTHON}/lib"]
        packages = sysconfig.get_path("purelib", vars={"base": prefix})
        if packages.startswith(f"{prefix}/") and os.path.isdir(packages):
            hidden = _PYTHON + packages.removeprefix(prefix)
            command += ["--tmpfs", hidden, "--remount-ro", hidden]
    else:
        command += ["--ro-bind", interpreter, interpreter]
    for place, descriptor in files.items():
        command += ["--perms", "0444", "--ro-bind-data", str(descriptor), place]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--perms", "1777", "--size", str(limits.file_mib * 2**20), "--tmpfs", "/work"]
    return [*command, "--remount-ro", "/", "--chdir", "/work", "--seccomp", str(calls), "--"]


def _guarded(limits: Limits) -> list[str]:
    """The interpreter and the guard with the limits, as far as the name of the function."""
    user = _FIRST_USER + os.getpid() % 2**22 * 256 + next(_RUNS) % 256
    numbers = (
        user if _is_root() else 0,
        math.ceil(limits.cpu_seconds),
        limits.memory_mib * 2**20,
        limits.processes,
        limits.file_mib * 2**20,
    )
    prefix, interpreter = _python()
    if prefix != "/usr":
        interpreter = _PYTHON + interpreter.removeprefix(prefix)
    return [interpreter, "-I", "-S", "-B", "/box/guard.py", *map(str, numbers)]


def _is_root() -> bool:
    return os.geteuid() == 0


def _python() -> tuple[str, str]:
    """(prefix, interpreter) of the Python that this one, or its environment, is of."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return os.path.realpath(sys.base_prefix), interpreter


def _gather(
    process: subprocess.Popen[bytes], deadline: float, most: int
) -> tuple[bytes, bytes, Literal["timeout", "output"] | None]:
    """What a process writes until it ends, until the deadline, or until it has written too much."""
    assert process.stdout and process.stderr
    pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out, err = pipes.values()
    ended = os.pidfd_open(process.pid)
    waiting, poll = {ended, *pipes}, select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    try:
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(out), bytes(err), "timeout" if ended in waiting else None
            for descriptor, _ in poll.poll(math.ceil(left * 1000)):
                data = os.read(descriptor, 65536) if descriptor in pipes else b""
                if data:
                    pipes[descriptor] += data
                    if len(pipes[descriptor]) > most:
                        return bytes(out[:most]), bytes(err[:most]), "output"
                    continue
                waiting.discard(descriptor)
                poll.unregister(descriptor)
                if descriptor == ended:  # what is below it is being killed: its pipes close, too
                    deadline = min(deadline, time.monotonic() + _LAST_SECONDS)
        return bytes(out), bytes(err), None
    finally:
        os.close(ended)
