"""A verifier that goes wrong costs one sample."""

from __future__ import annotations

import os
import sys
import time

import pytest

from step_jax.core.errors import ConfigError
from step_jax.environments.pool import Pool, PoolConfig
from step_jax.environments.verifiers import Exact
from tests.environments.bad_verifiers import Moody, NotLoadable, WhatIsLoaded

SECONDS = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("orphans")


@pytest.fixture(scope="module")
def pool(folder):
    config = PoolConfig(processes=1, seconds=SECONDS, memory_mib=1024, failure_score=-2.0)
    with Pool(Moody(str(folder)), config) as pool:
        yield pool


def one(pool, reply, **record):
    (score,) = pool.score([(reply, record)])
    return score


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("hang", "timeout"),
        ("crash", "crash"),
        ("exit", "crash"),
        ("leave", "error"),
        ("raise", "error"),
        ("nan", "not_finite"),
        ("infinite", "not_finite"),
        ("memory", "memory"),
    ],
)
def test_a_failure_has_its_score_and_its_reason_and_the_others_their_own(pool, reply, failure):
    before = pool.failures[failure]
    scores = pool.score([("good", {}), (reply, {}), ("alone", {"number": 7})])
    assert [score.total for score in scores] == [1.0, -2.0, 7.0]
    assert [score.failure for score in scores] == [None, failure, None]
    assert scores[1].detail
    assert pool.failures[failure] == before + 1


def test_a_detail_says_what_was_raised(pool):
    assert one(pool, "raise").detail == "KeyError: 'lost'"


def test_what_a_verifier_prints_is_no_score(pool):
    assert one(pool, "print").parts == {"moody": 1.0}


def test_a_verifier_that_forks_gives_its_own_score_once(pool):
    assert one(pool, "fork").total == 1.0
    assert one(pool, "alone", number=3).total == 3.0


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("reply", ["orphan", "hanging orphan"])
def test_a_process_that_a_verifier_leaves_behind_is_ended(pool, folder, reply):
    expected = None if reply == "orphan" else "timeout"
    assert one(pool, reply).failure == expected
    (path,) = folder.iterdir()
    path.unlink()
    deadline = time.monotonic() + 5
    while running(int(path.name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(int(path.name))
    assert one(pool, "good").total == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")
def test_a_confined_verifier_reads_and_computes_and_does_nothing_else(tmp_path):
    (tmp_path / "precious").write_text("5")
    config = PoolConfig(processes=1, seconds=SECONDS, failure_score=-2.0)
    refused = ["write", "delete", "call", "start", "fork", "end", "orphan"]
    with Pool(Moody(str(tmp_path), held=True), config) as pool:
        assert pool.confined
        scores = pool.score([(reply, {}) for reply in refused])
        assert [score.failure for score in scores] == ["error"] * len(refused)
        assert all(score.detail.startswith("PermissionError: [Errno 1]") for score in scores)
        assert [one(pool, reply).total for reply in ("read", "thread", "good")] == [5, 1, 1]
        assert one(pool, "crash").failure == "crash"
        assert one(pool, "hang").failure == "timeout"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_scores_come_in_order_and_a_process_that_dies_idle_costs_nothing(pool):
    process = pool._idle.get()
    os.kill(process._process.pid, 9)
    process._process.wait()
    pool._idle.put(process)
    samples = [("alone", {"number": i}) for i in range(100)]
    scores = pool.score(samples)
    assert [score.total for score in scores] == list(range(100))
    assert all(0 <= score.seconds < SECONDS for score in scores)


def test_single_replies_can_be_handed_in_while_others_are_written(pool):
    futures = [pool.submit("alone", {"number": i}) for i in range(3)]
    assert [future.result().total for future in futures] == [0, 1, 2]


def test_a_verifier_that_cannot_be_loaded_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="not_loadable.*no module named abacus"):
        Pool(NotLoadable(), PoolConfig(processes=1))


def test_several_processes_share_the_work_and_none_loads_jax():
    with Pool(WhatIsLoaded(), PoolConfig(processes=2)) as pool:
        scores = pool.score([("jax", {}), ("step_jax.environments.verifiers", {})] * 4)
    assert [score.total for score in scores] == [0.0, 1.0] * 4


def test_a_closed_pool_leaves_no_process():
    pool = Pool(Exact(), PoolConfig(processes=1))
    process = pool._idle.get()
    pool._idle.put(process)
    pool.close()
    assert not running(process._process.pid)
