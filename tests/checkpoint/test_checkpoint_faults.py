"""Damage on disk is found before use: bit flips, torn files, kill -9, full disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CorruptCheckpoint,
    verify,
)
from step_jax.checkpoint.manifest import MANIFEST, list_files, step_name
from step_jax.core.errors import CheckpointError, DiskFullError


def state_of(step: int) -> dict:
    return {"w": jnp.full((32, 16), float(step)), "b": jnp.arange(7, dtype=jnp.bfloat16) + step}


SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step), {"position": step})
    return directory


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flip": lambda p: flip_bit(p, 8 * p.stat().st_size // 2),
    "zero": zero,
    "truncate": truncate,
    "grow": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "delete": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_is_found_and_the_older_step_is_used(saved, tmp_path, how):
    names = [MANIFEST, *list_files(saved / step_name(2))]
    classes = {Path(n).name.split(".")[0] if "/d/" not in n else "data" for n in names}
    assert {"manifest", "step", "_METADATA", "data", "commit_success"} <= classes
    for i, name in enumerate(names):
        copy = tmp_path / str(i)
        shutil.copytree(saved, copy)
        victim = copy / step_name(2) / name
        if not victim.stat().st_size and how in ("flip", "zero", "truncate"):
            continue  # nothing to change in an empty file
        DAMAGE[how](victim)
        assert verify(copy)[2], name
        assert not verify(copy)[1]
        events: list[str] = []
        reader = Checkpointer(copy, on_event=events.append)
        restored, meta = reader.restore(None, SHAPES)
        assert meta == {"position": 1} and restored["w"][0, 0] == 1
        assert any("step 2 is DAMAGED" in e for e in events)
        with pytest.raises(CorruptCheckpoint, match="is damaged: "):
            reader.restore(2, SHAPES)


def test_hundred_random_single_bit_flips_are_all_found(saved, tmp_path):
    """Bits are drawn evenly over all bytes of the step, the manifest included."""
    step_dir = tmp_path / "run" / step_name(2)
    shutil.copytree(saved / step_name(2), step_dir)
    files = [step_dir / n for n in [MANIFEST, *list_files(step_dir)]]
    bits = [(f, b) for f in files for b in range(8 * f.stat().st_size)]
    found = 0
    for path, bit in random.Random(0).sample(bits, 100):
        flip_bit(path, bit)
        found += bool(verify(step_dir.parent)[2])
        flip_bit(path, bit)
    assert found == 100
    assert verify(step_dir.parent) == {2: []}


def test_every_bit_of_the_manifest_head_counts(saved, tmp_path):
    """The checksum line protects itself: case flips of hexadecimal letters included."""
    step_dir = tmp_path / step_name(2)
    shutil.copytree(saved / step_name(2), step_dir)
    for bit in range(8 * 33):
        flip_bit(step_dir / MANIFEST, bit)
        assert verify(tmp_path)[2], bit
        flip_bit(step_dir / MANIFEST, bit)


def test_foreign_and_swapped_files_are_found(saved, tmp_path):
    copy = tmp_path / "a"
    shutil.copytree(saved, copy)
    (copy / step_name(2) / "extra").write_bytes(b"x")
    assert verify(copy)[2] == ["extra: not part of this step"]
    swapped = tmp_path / "b"
    shutil.copytree(saved, swapped)
    shutil.rmtree(swapped / step_name(2))
    (swapped / step_name(1)).rename(swapped / step_name(2))
    assert "belongs to step 1" in verify(swapped)[2][0]


def test_damage_after_verification_is_found_too(saved, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    reader = Checkpointer(copy, on_event=lambda e: None)
    assert reader.latest() == 2
    flip_bit(copy / step_name(2) / "step.json", 100)
    assert reader.latest() == 1


def test_all_damaged_is_an_error_and_nothing_is_deleted(saved, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    for step in (1, 2):
        flip_bit(copy / step_name(step) / MANIFEST, 5)
    with Checkpointer(copy, CheckpointConfig(keep=1), lambda e: None) as saver:
        with pytest.raises(CheckpointError, match="no verified checkpoint"):
            saver.restore(None, SHAPES)
        saver.save(2, state_of(2), {})
        saver.save(3, state_of(3), {})
    assert {p.name for p in copy.iterdir()} == {step_name(1), "00000002.aside-0", step_name(3)}


def test_unfinished_saves_are_removed_on_entry_and_never_listed(saved, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    (copy / ".tmp-00000009").mkdir()
    (copy / ".tmp-00000009.orbax-checkpoint-tmp").mkdir()
    (copy / ".old-00000001").mkdir()
    assert Checkpointer(copy).steps() == [1, 2]
    with Checkpointer(copy, on_event=lambda e: None):
        assert {p.name for p in copy.iterdir()} == {step_name(1), step_name(2)}


TRAIN = """
import sys, jax, jax.numpy as jnp
from step_jax.checkpoint import Checkpointer, CheckpointConfig
step_fn = jax.jit(lambda s: {"step": s["step"] + 1, "w": s["w"] * 1.0001 + s["step"]},
                  donate_argnums=0)
state = {"step": jnp.int32(0), "w": jnp.ones(20_000)}
with Checkpointer(sys.argv[1], CheckpointConfig(keep=2), lambda e: print(e, flush=True)) as saver:
    if saver.latest() is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state, meta = saver.restore(None, shapes)
        assert meta["step"] == int(state["step"])
    print("start", int(state["step"]), flush=True)
    for step in range(int(state["step"]) + 1, int(sys.argv[2]) + 1):
        state = step_fn(state)
        saver.save(step, state, {"step": step})
"""


def kill_loop(directory: Path, kills: int, seed: int) -> None:
    """SIGKILL at random moments, mostly while saves follow each other; nothing may be lost."""
    rng, newest = random.Random(seed), 0
    for _ in range(kills):
        run = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(directory), "100000"], stdout=subprocess.PIPE
        )
        seen: list[str] = []
        first = "start" if rng.random() < 0.2 else "saved"  # some die before their first save
        while not seen or (first not in seen[-1] and seen[-1]):
            seen.append(run.stdout.readline().decode())
        started = next(int(line.split()[1]) for line in seen if line.startswith("start"))
        assert started >= newest, "a committed step was lost"
        time.sleep(rng.uniform(0.0, 0.5))
        run.send_signal(signal.SIGKILL)
        seen += run.stdout.read().decode().splitlines()
        run.wait()
        steps = [int(e.split()[2]) for e in seen if "saved" in e and len(e.split()) > 3]
        newest = max([newest, *steps])
        # Exactly the steps whose commit was announced, and at most one later one.
        good = [s for s, problems in verify(directory).items() if not problems]
        assert all(not p for p in verify(directory).values())
        assert not newest or good[-1] in (newest, newest + 1)
    assert newest > kills // 2, "the kills came too early to mean anything"


@pytest.mark.thorough
def test_kill_9_during_saves_loses_nothing_committed(tmp_path):
    kill_loop(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path):
    kill_loop(tmp_path, kills=20, seed=1)
    target = max(verify(tmp_path)) + 3
    for directory in (tmp_path, tmp_path / "undisturbed"):
        subprocess.run([sys.executable, "-c", TRAIN, str(directory), str(target)], check=True)
    shapes = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "w": jax.ShapeDtypeStruct((20_000,), jnp.float32),
    }
    killed, _ = Checkpointer(tmp_path).restore(target, shapes)
    smooth, _ = Checkpointer(tmp_path / "undisturbed").restore(target, shapes)
    assert killed["w"].tobytes() == smooth["w"].tobytes()


@pytest.fixture
def small_disk(tmp_path):
    """An 8 MB file system of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


BIG = {"w": jnp.ones(700_000)}  # 2.8 MB: two fit on the small disk, three do not


def test_full_disk_is_reported_at_the_same_save_and_costs_no_good_step(small_disk):
    events: list[str] = []
    directory = small_disk / "checkpoints"
    with pytest.raises(DiskFullError, match="needs 2.9 MB: free some space"):
        with Checkpointer(directory, CheckpointConfig(keep=5), events.append) as saver:
            for step in (1, 2, 3, 4):
                saver.save(step, BIG, {})
                assert len([e for e in events if "failure" in e]) == max(0, step - 2)
    assert verify(directory) == {1: [], 2: []}
    assert {p.name for p in directory.iterdir()} == {step_name(1), step_name(2)}


def test_run_goes_on_when_space_returns(small_disk):
    filler = small_disk / "filler"
    directory = small_disk / "checkpoints"
    with Checkpointer(directory, CheckpointConfig(keep=1), lambda e: None) as saver:
        saver.save(1, BIG, {})
        saver.wait()
        filler.write_bytes(bytes(3_500_000))
        saver.save(2, BIG, {})
        assert verify(directory) == {1: []}
        filler.unlink()
        saver.save(3, BIG, {})
    assert verify(directory) == {3: []}


def test_disk_that_fills_up_during_the_write(small_disk, monkeypatch):
    """Another program takes the space after the preflight check: the error still says disk full."""
    directory = small_disk / "checkpoints"
    events: list[str] = []
    with pytest.raises(DiskFullError) as error:
        with Checkpointer(directory, CheckpointConfig(keep=5), events.append) as saver:
            saver.save(1, BIG, {})
            saver.wait()
            (small_disk / "filler").write_bytes(bytes(3_500_000))
            monkeypatch.setattr(Checkpointer, "_prepare", lambda self, job: None)
            saver.save(2, BIG, {})
    assert error.value.exit_code == 73
    assert verify(directory) == {1: []}
    assert [p.name for p in directory.iterdir()] == [step_name(1)]
    os.remove(small_disk / "filler")
    with Checkpointer(directory, on_event=events.append) as saver:
        saver.save(2, BIG, {})
    assert verify(directory) == {1: [], 2: []}


def test_step_is_not_deleted_before_its_successor_is_verified(tmp_path, monkeypatch):
    """A commit that fails at the very last moment leaves the only good step alone."""
    with Checkpointer(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, state_of(1), {})

    def refuse(*_):
        raise OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match="step 2 failed.*Input/output"):
        with Checkpointer(tmp_path, CheckpointConfig(keep=1), lambda e: None) as saver:
            monkeypatch.setattr(os, "rename", refuse)
            saver.save(2, state_of(2), {})
    assert verify(tmp_path) == {1: []}
    restored, _ = Checkpointer(tmp_path).restore(None, SHAPES)
    np.testing.assert_array_equal(restored["w"], state_of(1)["w"])
