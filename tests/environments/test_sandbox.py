"""What a hostile program can do in the sandbox: nothing that anybody outside would notice."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.environments import sandbox, system_calls
from step_jax.environments.code import Code, same
from step_jax.environments.pool import Pool, PoolConfig
from step_jax.environments.sandbox import Limits, run

system = pytest.mark.system
QUICK = Limits(seconds=20, cpu_seconds=20)
CALL = "import ctypes as c; l = c.CDLL(None, use_errno=True)\n"  # of the kernel, past Python


@system
def test_a_program_reads_its_input_and_writes_its_output():
    ran = run("print(sum(map(int, input().split())))", "1 2 3\n", QUICK)
    assert ran.good and (ran.out, ran.err) == ("6\n", "")


@system
def test_a_function_is_called_and_what_it_prints_is_not_its_result():
    program = (
        "import json\n\ndef double(x):\n    print('hello')\n    return [x, {'twice': 2 * x}]\n"
    )
    ran = run(program, "[1.5]", QUICK, function="double")
    assert ran.good and (ran.out, ran.err) == ('[1.5, {"twice": 3.0}]', "hello\n")


@system
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/etc/shadow')", "FileNotFoundError"),
        (f"open({__file__!r})", "FileNotFoundError"),
        (f"import os; os.listdir({str(Path.home())!r})", "FileNotFoundError"),
        ("open('/usr/lib/evil', 'w')", "Read-only file system|Permission denied"),
        ("open('/evil', 'w')", "Read-only file system|Permission denied"),
        ("open('/dev/shm/evil', 'w')", "Read-only file system|Permission denied"),
        ("open('/box/program.py', 'w')", "Read-only file system|Permission denied"),
        ("import os; os.symlink('/etc/passwd', 'link'); open('link')", "FileNotFoundError"),
        ("import os; os.symlink('../../etc', 'link'); os.listdir('link')", "FileNotFoundError"),
        ("open('/proc/1/environ').read()", "PermissionError|FileNotFoundError"),
        ("open('/proc/1/mem', 'rb').read(1)", "PermissionError|FileNotFoundError|OSError"),
        ("import os; os.listdir('/proc/1/root')", "PermissionError|FileNotFoundError"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "OSError|refused"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "unreachable"),
        ("import socket; socket.getaddrinfo('example.com', 80)", "gaierror"),
        ("import os; os.fork()", "BlockingIOError"),
        ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
        ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
        ("import os; os.unshare(os.CLONE_NEWUSER)", "PermissionError"),
        ("import os; os.memfd_create('x')", "PermissionError"),
        ("import os; os.chroot('/work')", "PermissionError"),
        (CALL + "assert l.mount(b'x', b'/work', b'tmpfs', 0, None) == 0, c.get_errno()",
         "AssertionError: 1"),
        (CALL + "assert l.shmget(0, 1 << 30, 0o1777) >= 0, c.get_errno()",
         "AssertionError: 1"),
        (CALL + "assert l.ptrace(16, 1, 0, 0) == 0, c.get_errno()",
         "AssertionError: 1"),
        ("import resource as r; r.setrlimit(r.RLIMIT_NPROC, (99, 99))", "not allowed to raise"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("bytearray(2 ** 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2 ** 25))", "OSError|File too large"),
        ("for i in range(99): open(str(i), 'wb').write(bytes(2 ** 20))", "No space left on device"),
        ("f = [open('/dev/null') for _ in range(99)]", "Too many open files"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_fails(program, said):
    ran = run(program, limits=QUICK)
    assert ran.end == "exit" and ran.code == 1
    assert any(word in ran.err for word in said.split("|")), ran.err


@system
def test_only_the_programs_own_processes_and_no_variables_of_ours_are_seen(monkeypatch):
    monkeypatch.setenv("A_SECRET", "of ours")
    program = (
        "import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])\n"
        "print(sorted(os.environ), os.getuid() != 0, os.getgroups())\n"
        "print([open(f'/proc/{p}/cmdline').read() for p in ('1', 'self')])"
    )
    ran = run(program, limits=QUICK)
    seen, about, lines = ran.out.splitlines()
    assert seen == "['1', '2']" and "of ours" not in ran.out
    assert "SECRET" not in about and "True" in about
    assert str(Path(__file__).parents[2]) not in lines


@system
@pytest.mark.parametrize(
    ("program", "limits", "end"),
    [
        ("while True: pass", Limits(seconds=30, cpu_seconds=1), "signal"),
        ("import time\ntime.sleep(60)", Limits(seconds=1), "timeout"),
        ("import os\nos.close(1); os.close(2)\nwhile True: pass", Limits(seconds=1), "timeout"),
        ("import signal, time\nfor s in range(1, 32):\n  if s not in (9, 19): signal.signal(s, "
         "signal.SIG_IGN)\ntime.sleep(60)", Limits(seconds=1), "timeout"),
        ("while True: print('x' * 1000)", Limits(seconds=20), "output"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", QUICK, "signal"),
    ],
    ids=["loop", "sleep", "closed pipes", "deaf", "output", "crash"],
)  # fmt: skip
def test_a_program_that_does_not_end_is_ended(program, limits, end):
    begun = time.monotonic()
    assert run(program, limits=limits).end == end
    assert time.monotonic() - begun < limits.seconds + 5


def of_sandboxes() -> set[str]:
    """Processes on this machine that stand in a sandbox."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"/box/guard.py" in (process / "cmdline").read_bytes():
                found.add(process.name)
        except OSError:
            continue
    return found


@system
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(600)\n"
        "  os._exit(0)\nprint('done')",
        "import os, signal\nfor p in (os.getppid(), 1, -1):\n  try: os.kill(p, signal.SIGKILL)\n"
        "  except OSError: pass\nwhile True: pass",
    ],
    ids=["fork bomb", "double fork", "killing the parent"],
)
def test_nothing_survives_a_program(program):
    before = of_sandboxes()
    begun = time.monotonic()
    run(program, limits=Limits(seconds=2, processes=8))
    assert time.monotonic() - begun < 8
    deadline = time.monotonic() + 5
    while of_sandboxes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not of_sandboxes() - before
    assert run("print(1)", limits=QUICK).good


@system
def test_a_server_of_this_machine_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        ran = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        assert "OSError" in ran.err or "refused" in ran.err
        with pytest.raises(TimeoutError):
            server.accept()


@system
def test_sandboxes_beside_each_other_share_no_limit():
    ran = []

    def go():
        program = (
            "import threading, time\nt = threading.Thread(target=print)\nt.start()\nt.join()\n"
            "time.sleep(1)"
        )
        ran.append(run(program, limits=Limits(20, processes=2)))

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.good for one in ran] == [True] * 3, ran


# --- the verifier -------------------------------------------------------------------------------

DOUBLES = {"tests": [{"call": "double", "args": [21], "result": 42},
                     {"call": "double", "args": [-1], "result": -2}]}  # fmt: skip
SUMS = {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10"}]}
CODE = Code(limits=QUICK)


@system
@pytest.mark.parametrize(
    ("reply", "record", "score"),
    [
        ("<think>easy</think>\n```python\ndef double(x):\n    return 2 * x\n```", DOUBLES, 1),
        ("def double(x):\n    return abs(2 * x)", DOUBLES, 0),
        ("print(sum(map(int, input().split())), '\\n')", SUMS, 1),
        ("print(3)", SUMS, 0),
        ("<think>def double", DOUBLES, 0),
        ("def double(x:", DOUBLES, 0),
        ("import os\ndef double(x):\n    os.write(1, b'42')\n    os._exit(0)", DOUBLES, 0),
        # what would forge a verdict, if one were made inside
        ("print('PASS'); print('{\"score\": 1.0}'); raise SystemExit(0)", SUMS, 0),
        ("import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n        for v in "
         "f.f_locals.values():\n            if '42' in repr(v): return 42\n        f = f.f_back\n"
         "    return open('/proc/1/mem').read()", DOUBLES, 0),
        ("class Yes(int):\n    def __eq__(self, other): return True\n"
         "def double(x): return Yes(0)", DOUBLES, 0),
        ("import json\njson.dumps = lambda *_: 'true'\ndef double(x): return 0", DOUBLES, 0),
    ],
)  # fmt: skip
def test_a_program_is_scored_by_what_it_computes(reply, record, score):
    assert CODE.score(reply, record) == score


@system
def test_the_expected_answer_is_nowhere_in_the_sandbox():
    """In no file, argument, variable or memory that a program can read."""
    program = """
import ctypes, os, sys

def looks(data):
    parts = data.split(b"secret-")
    return any(part[:6][::-1] == b"rewsna" for part in parts[1:])

found = [sys.stdin.read().encode()]
for process in ("self", "1"):
    for name in ("cmdline", "environ"):
        try:
            found.append(open(f"/proc/{process}/{name}", "rb").read())
        except OSError:
            pass
for top in set(os.listdir("/")) - {"proc", "usr", "python", "lib", "lib64", "dev"}:
    for folder, _, files in os.walk("/" + top):
        found += [open(os.path.join(folder, file), "rb").read() for file in files]
leaks = [looks(data) for data in found]
spans = [line.split() for line in open("/proc/self/maps")]
seen = set()
for span, flags, *rest in spans:
    begin, end = (int(x, 16) for x in span.split("-"))
    if flags.startswith("rw"):
        leaks.append(looks(ctypes.string_at(begin, end - begin)))
        seen.add(rest[-1])  # how many spans there are is the kernel's whim: it joins neighbours
print(any(leaks), {"[heap]", "[stack]"} < seen, len(found) > 3)
"""
    record = {"tests": [{"stdin": "", "stdout": "secret-answer"}]}
    assert Code(thinking=None, limits=QUICK).score(program, record) == 0.0
    ran = run(program, limits=QUICK)
    assert ran.out == "False True True\n", ran
    known = "x = 'secret-answer'\n" + program
    assert run(known, limits=QUICK).out == "True True True\n"  # it would be found


@system
def test_a_program_cannot_be_promised_more_memory_than_its_process_has():
    with pytest.raises(ConfigError, match="4096 MiB .* only 1024: raise workers.memory_mib"):
        Pool(Code(limits=Limits(memory_mib=4096)), PoolConfig(processes=1, memory_mib=1024))


@system
def test_part_of_the_tests_can_count():
    record = {"tests": [*SUMS["tests"], {"stdin": "x", "stdout": "0"}]}
    score = Code(limits=QUICK, partial=True).score("print(sum(map(int, input().split())))", record)
    assert score == pytest.approx(2 / 3)


@system
def test_programs_run_in_the_processes_of_the_pool():
    with Pool(Code(limits=Limits(seconds=2)), PoolConfig(processes=2, seconds=30)) as pool:
        scores = pool.score([("def double(x): return x + x", DOUBLES),
                             ("import time\ntime.sleep(99)", DOUBLES),
                             ("def double(x): return x + x", DOUBLES)])  # fmt: skip
    assert [(score.total, score.failure) for score in scores] == [(1, None), (0, None), (1, None)]


@system
def test_a_worker_that_is_ended_takes_its_sandbox_along():
    before = of_sandboxes()
    with Pool(Code(limits=Limits(seconds=60)), PoolConfig(processes=1, seconds=2)) as pool:
        (score,) = pool.score([("import time\ntime.sleep(99)", DOUBLES)])
        assert score.failure == "timeout"
    time.sleep(0.5)
    assert not of_sandboxes() - before


# --- without a sandbox --------------------------------------------------------------------------


@pytest.fixture
def asked_anew():
    sandbox.require.cache_clear()
    yield
    sandbox.require.cache_clear()


def test_without_bubblewrap_the_message_says_what_to_install(monkeypatch, asked_anew, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no bwrap here: .*apt install bubblewrap"):
        Code().load()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo --ro-bind", "older than 0.8"),
        ("case $1 in --help) echo --disable-userns --size;; *) echo bwrap: no >&2; exit 1;; esac",
         r"cannot make a sandbox here \(bwrap: no\).*max_user_namespaces"),
    ],
    ids=["old", "forbidden"],
)  # fmt: skip
def test_a_bubblewrap_that_is_of_no_use_is_refused(
    monkeypatch, asked_anew, tmp_path, script, message
):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=message):
        Code().load()


def test_a_machine_whose_calls_are_not_known_is_refused():
    with pytest.raises(ConfigError, match="calls of x86_64, aarch64 are known, not those of m68k"):
        system_calls.denied("m68k")


def test_a_filter_is_whole_instructions_that_jump_forward_and_end():
    import struct

    for machine in ("x86_64", "aarch64"):
        content = system_calls.denied(machine)
        program = [struct.unpack_from("=HBBI", content, i) for i in range(0, len(content), 8)]
        assert program[-1][0] == 0x06 and program[-1][3] == 0x7FFF0000
        for i, (code, yes, no, _) in enumerate(program):
            if code & 7 == 5:
                assert i + 1 + max(yes, no) < len(program)


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ([1, 2.0], [1, 2], True),
        (0.1 + 0.2, 0.3, True),
        (1, True, False),
        (0, False, False),
        ("1", 1, False),
        ([1], [1, 2], False),
        ({"a": [1]}, {"a": [1.0]}, True),
        ({"a": 1}, {"b": 1}, False),
        (float("nan"), float("nan"), False),
        (None, None, True),
    ],
)
def test_values_are_compared_as_json_has_them(found, expected, equal):
    assert same(found, expected) is equal


def test_tests_that_cannot_be_run_are_refused():
    for record, message in [
        ({}, "a.jsonl:1: tests are None"),
        ({"tests": [{"stdin": "1"}]}, "a.jsonl:1, test 0 is .* must have stdin and stdout"),
    ]:
        with pytest.raises(DataError, match=message):
            Code().check(record, "a.jsonl:1")
