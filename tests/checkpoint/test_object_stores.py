"""Steps in object stores: what commits one, what a kill leaves, what is found and refused."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CorruptCheckpoint,
    remote_arrays,
    verify,
)
from step_jax.cli.main import main
from step_jax.core.errors import CheckpointError, ConfigError, StorageError
from step_jax.core.storage import Objects
from tests.object_stores import store


# moto takes ten times as long as fake-gcs-server.
@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.thorough)])
def bucket(request):
    with store(request.param) as url:
        yield url


@pytest.fixture
def place(bucket, request) -> Objects:
    return Objects.at(f"{bucket}/{request.node.originalname}/checkpoints")


def state_of(step: int) -> dict:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    sharded = NamedSharding(mesh, PartitionSpec("a", "b"))
    return {
        "w": jax.device_put(jnp.arange(32.0).reshape(4, 8) + step, sharded),
        "half": jnp.full((3,), step, jnp.bfloat16),
        "step": jnp.asarray(step),
        "empty": jnp.zeros((0, 4)),
        "host": np.arange(5, dtype=np.uint32) + step,
    }


def save(place: Objects, *steps: int, events=None, **settings) -> None:
    config = CheckpointConfig(**settings)
    with Checkpointer(place, config, (events if events is not None else []).append) as saver:
        for step in steps:
            saver.save(step, state_of(step), {"step": step}, {"carried": np.array([step])})
            saver.wait()


def assert_holds(place, step: int) -> None:
    like = jax.tree.map(lambda x: x, state_of(0))
    saver = Checkpointer(place)
    state, meta = saver.restore(step, like)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(like)]
    assert meta == {"step": step} and saver.carried(step)["carried"] == step


def test_steps_are_saved_kept_and_restored_as_on_a_disk(place, capsys):
    save(place, 1, 2, 3, keep=2)
    assert Checkpointer(place).steps() == [2, 3] and Checkpointer(place).latest() == 3
    assert_holds(place, 3)
    assert not [name for name in place.list() if name.startswith("00000001")]
    assert verify(str(place)) == {2: [], 3: []}
    assert main(["checkpoints", "verify", str(place.parent)]) == 0
    assert "verified" in capsys.readouterr().out


def test_large_arrays_are_written_in_parts_and_read_a_few_at_a_time(place, monkeypatch):
    monkeypatch.setattr(remote_arrays, "_CHUNK_BYTES", 24)
    monkeypatch.setattr(remote_arrays, "_READ_BYTES", 40)
    assert remote_arrays._chunk((4, 6), 4) == [1, 6] and remote_arrays._chunk((7, 5), 4) == [1, 5]
    assert remote_arrays._chunk((11,), 4) == [1] and remote_arrays._chunk((), 4) == []
    save(place, 1)
    assert_holds(place, 1)


def test_what_has_no_manifest_is_no_step_and_goes_at_the_next_start(place):
    save(place, 1, 2)
    (place / "00000002").delete(["manifest.json"])  # killed before the last object was written
    assert Checkpointer(place).steps() == [1]
    events: list[str] = []
    save(place, events=events)
    assert "removing unfinished save 00000002" in events[0]
    assert not [name for name in place.list() if name.startswith("00000002")]
    assert_holds(place, 1)


def test_damage_to_any_object_is_found_and_the_older_step_is_used(place):
    save(place, 1, 2)
    step = place / "00000002"
    for name in step.list():
        whole = step.read(name)
        for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], None):
            step.delete([name]) if damaged is None else step.write(name, damaged)
            assert Checkpointer(place).latest() == 1
            if name != "manifest.json":
                with pytest.raises(CorruptCheckpoint, match=name):
                    Checkpointer(place).restore(2, state_of(0))
        step.write(name, whole)
    assert_holds(place, 2)
    saver = Checkpointer(place)
    assert saver.latest() == 2
    step.write("more", b"of another save")
    assert saver.latest() == 1, "a step is looked at again once an object of it has changed"


def test_a_damaged_step_is_set_aside_when_the_run_reaches_it_again(place):
    save(place, 1, 2, 3, keep=3)
    (place / "00000002").write("step.json", b"{}")
    events: list[str] = []
    with Checkpointer(place, on_event=events.append) as saver:
        saver.restore(1, state_of(0))
        saver.save(2, state_of(2), {"step": 2}, {"carried": np.array([2])})
    assert_holds(place, 2)
    assert Checkpointer(place).steps() == [1, 2]
    assert (place / "00000002.aside-0").read("step.json") == b"{}"
    assert "00000003.aside-0" in " ".join(events)
    save(place)
    assert (place / "00000003.aside-0").list(), "what is set aside is not removed"


def test_a_step_that_is_copied_to_a_disk_is_read_there_and_one_from_there_in_the_store(
    place, tmp_path
):
    save(place, 1)
    place.download(tmp_path / "copy", place.list())
    assert_holds(tmp_path / "copy", 1)
    with Checkpointer(tmp_path / "made") as saver:
        saver.save(1, state_of(1), {"step": 1}, {"carried": np.array([1])})
    files = [p for p in (tmp_path / "made").rglob("*") if p.is_file()]
    there = place.parent / "uploaded"
    there.upload(tmp_path / "made", [p.relative_to(tmp_path / "made").as_posix() for p in files])
    assert_holds(there, 1)
    shutil.rmtree(tmp_path / "made")


def test_a_save_whose_commit_is_refused_leaves_no_step_and_fails(place):
    def refuse() -> None:
        raise CheckpointError("taken for dead")

    with pytest.raises(CheckpointError, match="taken for dead"):
        with Checkpointer(place, before_commit=refuse) as saver:
            saver.save(1, state_of(1), {})
    assert Checkpointer(place).steps() == [] and place.list() == []


def test_a_store_that_is_not_known_or_has_no_such_bucket_is_refused(bucket):
    with pytest.raises(ConfigError, match="gs:// and s3://"):
        Checkpointer("azure://bucket/run")
    there = Objects(Objects.at(bucket).scheme, "no-such-bucket-here", "run")
    with pytest.raises((ConfigError, StorageError), match="no-such-bucket-here/run"):
        there.write("x", b"")
