"""The lock of a run in an object store, and the folder that is copied there."""

from __future__ import annotations

import json
import time

import pytest

from step_jax.core.errors import ConfigError, TakenOverError
from step_jax.core.storage import Objects
from step_jax.runs import lease as lease_lib
from step_jax.runs.lease import LOCK, Lease
from step_jax.runs.metrics_log import MetricsLog, read_metrics
from step_jax.runs.mirror import fetch
from step_jax.runs.run_directory import RunDirectory
from tests.object_stores import store


@pytest.fixture(scope="module")
def bucket():
    with store("s3") as url:
        yield url


@pytest.fixture
def place(bucket, request, monkeypatch) -> Objects:
    monkeypatch.setattr(lease_lib, "BEAT_S", 0.2)
    monkeypatch.setattr(lease_lib, "PATIENCE_S", 0.6)
    return Objects.at(f"{bucket}/{request.node.originalname}")


def elsewhere(lease: Lease) -> Lease:
    lease._owner |= {"machine": "another", "host": "far", "pid": 7}
    return lease


def test_two_runs_do_not_share_a_directory_and_one_that_ends_gives_it_back(place):
    with RunDirectory(str(place)) as directory:
        with pytest.raises(ConfigError, match="is in use by process .* on "):
            Lease(place).take()
        assert directory.checkpoints == place / "checkpoints"
    assert LOCK not in place.list()
    Lease(place).take()


def test_an_owner_that_writes_its_lock_is_waited_for_no_longer_and_one_that_does_not_is_gone(place):
    first = elsewhere(Lease(place))
    first.take()
    second = Lease(place)
    second.take()  # nothing was heard of the first for as long as an owner may be silent
    with pytest.raises(TakenOverError, match="taken for dead: .* in use by process"):
        first.renew()
    first.release()  # what is not its own it leaves alone
    second.renew()
    second.release()
    assert place.list() == []


def test_an_answer_that_got_lost_does_not_cost_the_lock(place):
    lease = Lease(place)
    lease.take()
    before = lease._generation
    lease.renew()
    lease._generation = before  # as if the store had written it and its answer never came
    lease.renew()
    lease.release()
    assert place.list() == []


def test_a_living_owner_on_another_machine_refuses_others(place, monkeypatch):
    owner = elsewhere(Lease(place))
    owner.take()

    def sleep(_: float) -> None:
        owner.renew()

    monkeypatch.setattr(lease_lib.time, "sleep", sleep)
    with pytest.raises(ConfigError, match="process 7 on far since"):
        Lease(place).take()


def test_an_owner_hears_within_a_beat_that_another_has_its_objects_and_leaves_them_alone(place):
    heard, other = [], b'{"host": "far", "pid": 7}'
    with pytest.raises(TakenOverError, match="in use by process 7 on far"):
        with RunDirectory(str(place), on_lost=heard.append) as directory:
            while place.write(LOCK, other, instead_of=place.generation(LOCK)) is None:
                continue  # the owner was quicker
            deadline = time.monotonic() + 60
            while not heard and time.monotonic() < deadline:
                time.sleep(0.05)
            assert heard and directory.lost
            directory.metrics.write_text("not for the other")
    assert place.get(LOCK) == other and "metrics.jsonl" not in place.list()


def test_a_killed_process_of_this_machine_is_followed_at_once(place, monkeypatch):
    monkeypatch.setattr(lease_lib, "PATIENCE_S", 1000.0)
    killed = Lease(place)
    killed._owner["pid"] = 2**22 + 1  # above the largest that there can be
    killed.take()
    begin = time.monotonic()
    Lease(place).take()
    assert time.monotonic() - begin < 100


def test_a_run_that_cannot_write_is_refused_before_it_begins_and_leaves_nothing_here(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        ConfigError, match="no-such-bucket-there/run/may-write: there is no such bucket"
    ):
        RunDirectory("s3://no-such-bucket-there/run").__enter__()
    assert not list(tmp_path.iterdir())


def test_what_a_run_wrote_is_there_for_the_next_machine(place, tmp_path):
    with RunDirectory(str(place)) as first:
        log = MetricsLog(first.metrics)
        log.append("step", 1, {"loss": 2.0})
        directory, identity = first.path, first.identity.read_text()
        first.heldout.mkdir()
        (first.heldout / "0.tokens.npy").write_bytes(b"x")
        first.keep()
        assert place.read("metrics.jsonl") == first.metrics.read_bytes()
        log.append("step", 2, {"loss": 1.0})
        log.close()
        (first.plots / "loss.png").parent.mkdir()
        (first.plots / "loss.png").write_bytes(b"picture")
    assert not directory.exists(), "the copy of this machine goes with the process"
    with RunDirectory(str(place)) as second:
        steps = [json.loads(line)["step"] for line in second.metrics.read_text().splitlines()]
        assert steps == [1, 2] and second.identity.read_text() == identity
        assert [record["step"] for record in read_metrics(str(place))] == [1, 2]
        assert not second.plots.exists(), "what no run reads back is not fetched"
        assert not second.heldout.exists(), "documents without meta.json are not whole"
    assert place.read("plots/loss.png") == b"picture"
    fetch(place, tmp_path / "copy")
    assert (tmp_path / "copy" / "identity").read_text() == identity
