"""Saving and restoring: bit exactness, snapshots under donation, retention, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointMismatch,
    NonFiniteState,
    verify,
)
from step_jax.checkpoint.arrays import HostSnapshot
from step_jax.core.errors import CheckpointError, ConfigError, RestartRequested


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict | None


def make_state(seed: int = 0, sharding=None) -> State:
    key = jax.random.key(seed)
    state = State(
        step=jnp.int32(seed),
        params={
            "matrix": jax.random.normal(key, (16, 8)),
            "half": jax.random.normal(key, (8, 24), jnp.bfloat16),
            "bits": jax.random.bits(key, (8,)),
            "empty": jnp.zeros((0, 3)),
        },
        ema=None,
    )
    return state if sharding is None else jax.device_put(state, sharding(state))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def events():
    return []


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("x", "y")[: len(shape)])


def test_round_trip_is_bit_exact_for_every_dtype_and_none(tmp_path):
    state, meta = make_state(3), {"seed": 7, "tokenizer": "ab", "nested": {"position": [1, 2]}}
    with Checkpointer(tmp_path) as saver:
        saver.save(3, state, meta)
    restored, restored_meta = Checkpointer(tmp_path).restore(None, abstract(state))
    assert_same_bits(state, restored)
    assert restored_meta == meta
    assert verify(tmp_path) == {3: []}


def test_numpy_leaf_is_copied_at_the_call(tmp_path):
    buffer = np.arange(1000, dtype=np.int64)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"replay": buffer}, {})
        buffer[:] = -1
    shape = jax.ShapeDtypeStruct((1000,), np.dtype(np.int64))
    restored, _ = Checkpointer(tmp_path).restore(1, {"replay": shape})
    np.testing.assert_array_equal(restored["replay"], np.arange(1000))


@pytest.mark.thorough
@pytest.mark.parametrize("inline", [False, True])  # True: as on accelerators
@pytest.mark.parametrize("devices", [1, 8])
def test_saved_values_are_those_of_the_call_although_buffers_are_donated(
    tmp_path, devices, inline, monkeypatch
):
    if inline:
        monkeypatch.setattr(HostSnapshot, "take", lambda self, flat: None)
    sharding = NamedSharding(mesh_of(devices), PartitionSpec("x"))
    advance = jax.jit(
        lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=sharding
    )
    state = jax.device_put({"a": jnp.zeros((64, 4096)), "b": jnp.zeros((8, 3))}, sharding)
    with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as saver:
        for step in range(1, 6):
            state = advance(state)
            saver.save(step, state, {})
            for _ in range(3):  # donates the buffers that are being written
                state = advance(state)
    reader = Checkpointer(tmp_path)
    for step in range(1, 6):
        restored, _ = reader.restore(step, abstract(state))
        for leaf in jax.tree.leaves(restored):
            np.testing.assert_array_equal(np.asarray(leaf), 4.0 * (step - 1) + 1)


@pytest.mark.parametrize("target", [(8,), (2, 4), (1,)])
def test_restores_onto_another_mesh(tmp_path, target):
    source = NamedSharding(mesh_of(4, 2), PartitionSpec("x", "y"))
    state = jax.device_put({"w": jnp.arange(64 * 16.0).reshape(64, 16)}, source)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
    sharding = NamedSharding(mesh_of(*target), PartitionSpec(("x", "y")[: len(target)]))
    wanted = {"w": jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding)}
    restored, _ = Checkpointer(tmp_path).restore(1, wanted)
    assert restored["w"].sharding == sharding
    assert_same_bits(state, restored)


def test_part_of_a_state_can_be_restored_alone_and_as_numpy(tmp_path):
    state = make_state(1)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, {"a": 1})
    reader = Checkpointer(tmp_path)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    params, meta = reader.restore(1, shapes, subtree="params")
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert_same_bits(state.params, params)
    assert meta == reader.meta(1) == {"a": 1}
    one, _ = reader.restore(1, shapes["half"], subtree="params.half")
    assert_same_bits(one, state.params["half"])


def test_mismatch_names_every_leaf(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(1)}, {})
    other = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(5), "d": jnp.ones(1)}
    with pytest.raises(CheckpointMismatch) as error:
        Checkpointer(tmp_path).restore(1, abstract(other))
    message = str(error.value)
    assert "a: stored float32[2, 3], expected bfloat16[2, 3]" in message
    assert "b: stored float32[4], expected float32[5]" in message
    assert "c: only in the checkpoint" in message
    assert "d: not in the checkpoint" in message


def test_retention_keeps_newest_and_permanent_steps(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(every_steps=1, keep=2, keep_every=4)) as saver:
        for step in range(1, 8):
            saver.save(step, {"a": jnp.full(3, step)}, {})
    assert sorted(verify(tmp_path)) == [4, 6, 7]
    assert {p.name for p in tmp_path.iterdir()} == {"00000004", "00000006", "00000007"}


def test_steps_to_keep_that_are_not_saved_are_refused():
    with pytest.raises(ConfigError, match="keep_every is 200 .* multiple of .*every_steps, 250"):
        CheckpointConfig(every_steps=250, keep_every=200)


def test_non_finite_state_is_never_committed(tmp_path, events):
    good, bad = {"a": jnp.ones(3)}, {"a": jnp.array([1, jnp.nan, 1])}
    with pytest.raises(NonFiniteState, match="step 3"):
        with Checkpointer(tmp_path, on_event=events.append) as saver:
            saver.save(1, good, {})
            saver.save(2, {"a": jnp.array([1, jnp.inf, 1], jnp.bfloat16)}, {})
            saver.save(3, bad, {})
    assert verify(tmp_path) == {1: []}
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert sum("NaN or infinity" in e for e in events) == 2


def test_large_finite_values_pass_the_gate(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"a": jnp.full(3, 3e38), "b": jnp.full(3, -3e38, jnp.bfloat16)}, {})
    assert Checkpointer(tmp_path).latest() == 1


def test_later_success_clears_a_failure(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(max_failures=2)) as saver:
        for step in range(1, 7):  # never two failures in a row
            saver.save(step, {"a": jnp.full(3, jnp.nan if step % 2 else 1.0)}, {})
    assert sorted(verify(tmp_path)) == [4, 6]


def test_repeated_failure_stops_the_run(tmp_path):
    started = 0
    with pytest.raises(NonFiniteState, match="step 2"):
        with Checkpointer(tmp_path, CheckpointConfig(max_failures=2)) as saver:
            for started in range(1, 9):
                saver.save(started, {"a": jnp.full(3, jnp.nan)}, {})
    assert started == 3


@pytest.mark.parametrize("leave", [None, SystemExit(0), RestartRequested("saved")])
def test_failed_last_save_turns_a_clean_exit_into_an_error(tmp_path, leave):
    with pytest.raises(NonFiniteState):
        with Checkpointer(tmp_path) as saver:
            saver.save(1, {"a": jnp.full(3, jnp.nan)}, {})
            if leave:
                raise leave


def test_exception_of_the_run_is_not_masked_and_the_save_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with Checkpointer(tmp_path) as saver:
            saver.save(1, {"a": jnp.ones(3)}, {})
            raise ZeroDivisionError
    assert verify(tmp_path) == {1: []}


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise KeyError", "pass"])
def test_process_that_ends_right_after_save_keeps_the_step(tmp_path, ending):
    code = f"""
import sys, jax.numpy as jnp
from step_jax.checkpoint import Checkpointer
with Checkpointer({str(tmp_path)!r}) as saver:
    saver.save(1, {{"a": jnp.ones(300_000)}}, {{}})
    {ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == (1 if "KeyError" in ending else 0), done.stderr[-2000:]
    assert verify(tmp_path) == {1: []}


def test_save_outside_of_with_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="could be lost"):
        Checkpointer(tmp_path).save(1, {"a": jnp.ones(3)}, {})


def test_same_step_is_not_written_twice(tmp_path, events):
    state = {"a": jnp.ones(3)}
    with Checkpointer(tmp_path, on_event=events.append) as saver:
        saver.save(1, state, {})
        saver.save(1, state, {})
    with Checkpointer(tmp_path, on_event=events.append) as saver:
        restored, _ = saver.restore(None, abstract(state))
        saver.save(1, restored, {})
    assert sum("saved" in e for e in events) == 1


def test_restart_from_an_older_step_sets_newer_ones_aside(tmp_path, events):
    state = {"a": jnp.ones(3)}
    with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as saver:
        for step in (1, 2, 3):
            saver.save(step, state, {"branch": 0})
    with Checkpointer(tmp_path, CheckpointConfig(keep=9), events.append) as saver:
        saver.restore(1, abstract(state))
        saver.save(2, state, {"branch": 1})
    assert sorted(verify(tmp_path)) == [1, 2]
    assert Checkpointer(tmp_path).meta(2) == {"branch": 1}
    assert {p.name for p in tmp_path.glob("*.aside-*")} == {"00000002.aside-0", "00000003.aside-0"}


@pytest.mark.parametrize(
    ("state", "meta", "match"),
    [
        ({"a": 3}, {}, "'a' is a int"),
        ({"a": jnp.ones(3)}, {"f": object()}, "not JSON"),
        ({"a": jax.random.key(0)}, {}, "random key"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, {}, "share the path 'a.b'"),
    ],
)
def test_unsavable_input_is_named(tmp_path, state, meta, match):
    with Checkpointer(tmp_path) as saver:
        with pytest.raises(CheckpointError, match=match):
            saver.save(1, state, meta)


def test_empty_directory_and_unknown_store_are_clear(tmp_path):
    assert Checkpointer(tmp_path / "none").latest() is None
    with pytest.raises(CheckpointError, match="no verified checkpoint"):
        Checkpointer(tmp_path / "none").restore(None, {})
    with pytest.raises(ConfigError, match="gs:// and s3://"):
        Checkpointer("azure://bucket/run")
    with pytest.raises(ConfigError, match="checkpoint.keep must be at least 1"):
        CheckpointConfig(keep=0)


def test_import_needs_neither_jax_nor_orbax():
    code = (
        "import sys, step_jax.checkpoint as c; c.verify('nowhere'); c.CheckpointConfig();"
        "assert not {'jax', 'orbax'} & set(sys.modules), 'heavy import';"
        "c.Checkpointer; assert 'orbax.checkpoint' not in sys.modules, 'orbax'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_thread_is_left(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"a": jnp.ones(3)}, {})
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
