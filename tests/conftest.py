"""Runs before any test module: eight simulated CPU devices, no accelerator by accident."""

import collections
import gc
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()

# Eight devices meet on two cores: what is slow there, for a minute, is no deadlock.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=300"
# Tests and their commands run what they compile a few times: to optimise it costs more than it
# gives.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tracing makes objects by the million that stay: to look for garbage among every 700 of them takes
# a twentieth of the processor's time.
gc.set_threshold(50_000, 20, 20)
# What one test compiled, other tests, their commands and the next run of the tests need not compile
# again: a second run takes a third of the first. JAX finds a program by its operations, flags and
# versions; by the name of the machine here, as code for another processor would not run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = Path(__file__).parents[1] / ".pytest_cache" / "programs" / platform.node()
    _programs.mkdir(parents=True, exist_ok=True)
    for _path in _programs.iterdir():
        if time.time() - _path.stat().st_mtime > 7 * 86400:
            _path.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import pytest  # noqa: E402
from jax._src import compilation_cache  # noqa: E402

_put = compilation_cache.put_executable_and_time


def _put_of_one_device(key, name, executable, *rest):
    """Programs of several CPU devices are not kept: see ``step_jax.core.kept_programs``."""
    devices = getattr(executable, "local_devices", list)()  # one for devices elsewhere has none
    if len(devices) <= 1:
        _put(key, name, executable, *rest)


compilation_cache.put_executable_and_time = _put_of_one_device

from hypothesis import settings  # noqa: E402

# Compilation makes the first example of a property slow, so a deadline would be noise.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")


@pytest.fixture
def topology(monkeypatch):
    """Name, as ``v6e:2x2``, to the description of TPUs that can be compiled for without them, as
    their users compile."""
    if importlib.util.find_spec("libtpu") is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            pytest.skip("libtpu is made for Linux on x86-64 only")
        pytest.fail("libtpu is missing: pip install '.[dev]'")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests compile at the same time
        "TPU_ACCELERATOR_TYPE": "v6e-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    import jax
    from jax.experimental import topologies

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name)
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_addoption(parser):
    parser.addoption(
        "--rooms", action="store_true", help="print the CPU-seconds of the tests of every room"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Every phase of a test carries what it cost this process and those that it waited for."""
    report = yield
    global _spent
    before, _spent = _spent, sum(os.times()[:4])
    report.cpu_s = _spent - before
    return report


_spent = sum(os.times()[:4])


def pytest_collection_finish(session):
    """What it takes to import the tests is no test's."""
    global _spent
    _spent = sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--rooms"):
        return
    seconds: collections.Counter[str] = collections.Counter()
    tests: collections.Counter[str] = collections.Counter()
    for report in (r for found in terminalreporter.stats.values() for r in found):
        if hasattr(report, "cpu_s"):
            _, room, *inside = report.nodeid.partition("::")[0].split("/")
            room = f"{room}/" if inside else room
            seconds[room] += report.cpu_s
            tests[room] += report.when == "call"
    terminalreporter.write_sep("-", "CPU-seconds by room (and tests)")
    for room, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:8.1f}  {room} ({tests[room]})")
    terminalreporter.write_line(f"{seconds.total():8.1f}  all ({tests.total()})")


_LEFT_OUT: collections.Counter[str] = collections.Counter()


def pytest_deselected(items):
    """Counts what the selection by markers leaves out."""
    for item in items:
        markers = ("slow", "thorough", "aot", "hopper", "system", "gpu")
        _LEFT_OUT.update([m for m in markers if item.get_closest_marker(m)][:1])


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its count to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left_out"] = dict(_LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Every worker collects everything, so the count of one is that of all."""
    _LEFT_OUT.clear()
    _LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_unconfigure(config):
    """The last lines: each test that was skipped with its reason, and what was not selected."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        reporter.write_line(f"skipped: {report.nodeid}: {reason}")
    counts = ", ".join(f"{count} {marker}" for marker, count in sorted(_LEFT_OUT.items()))
    if counts:
        reporter.write_line(f"not selected, by marker (pyproject.toml): {counts}")
