"""The ``checkpoints`` command on good, damaged and missing steps."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from step_jax.checkpoint import Checkpointer
from step_jax.cli import checkpoints
from step_jax.core.errors import CheckpointError, ConfigError


def command(argv):
    return checkpoints.run(checkpoints.parse(argv))


def test_list_and_verify(tmp_path, capsys):
    with Checkpointer(tmp_path / "checkpoints") as saver:
        for step in (1, 2):
            saver.save(step, {"a": jnp.ones(3)}, {})
    assert command(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("1 arrays") == 2
    assert command(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    (tmp_path / "checkpoints" / "00000002" / "step.json").write_text("{}")
    assert command(["verify", str(tmp_path / "checkpoints")]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "step.json: 2 bytes" in out
    assert command(["list", str(tmp_path)]) == 0
    with pytest.raises(CheckpointError, match="give a run directory"):
        command(["list", str(tmp_path / "nowhere")])


def test_an_unknown_action_is_a_configuration_error(capsys):
    with pytest.raises(ConfigError, match="see step-jax checkpoints --help"):
        command(["look", "somewhere"])
    assert "choose from" in capsys.readouterr().err
