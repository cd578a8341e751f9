"""What a run has been through: its outcome, and the configuration it was trained with."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from step_jax import PretrainConfig
from step_jax.core.config import to_plain
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.runs.history import (
    Branch,
    check_rates,
    continue_configuration,
    ending,
    flat_configuration,
    outcome,
)
from step_jax.runs.metrics_log import read_metrics
from step_jax.runs.run_directory import RunDirectory
from step_jax.runs.session import RunConfig
from step_jax.trainers.diffusion.flow_matching import Config as FlowMatchingConfig
from step_jax.trainers.rl.config import Config as RLConfig
from step_jax.training.schedules import WSD, Constant, Cosine, build

REAL = Path(__file__).parent / "real"


@dataclass(frozen=True)
class Optimizer:
    rate: float = 0.1
    clip: float | None = None


@dataclass(frozen=True)
class Training:
    steps: int = 100
    rows: int = 4
    accumulation: int = 1


@dataclass(frozen=True)
class Evaluation:
    every_steps: int = 10


@dataclass(frozen=True)
class Loop:
    run: RunConfig
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()


@pytest.fixture
def stored(tmp_path):
    """The directory of a run that has finished 100 steps of 100, and its configuration."""
    config = Loop(RunConfig(str(tmp_path / "run")))
    with RunDirectory(tmp_path / "run") as directory:
        assert continue_configuration(directory, config, 0, 100) == []
        yield directory, config


def files(directory):
    return {p.name: p.read_text() for p in directory.path.glob("config*")}


def test_the_same_configuration_goes_on_without_a_word(stored):
    directory, config = stored
    before = files(directory)
    assert continue_configuration(directory, config, 100, 100) == []
    assert files(directory) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer": Optimizer(rate=0.2)}, "optimizer.rate was 0.1 and is 0.2"),
        ({"optimizer": Optimizer(clip=1.0)}, "optimizer.clip was null and is 1.0"),
        ({"training": Training(rows=8)}, "training.rows was 4 and is 8"),
        ({"run": 1}, "run.seed was 0 and is 1"),
    ],
)
def test_what_a_run_was_trained_with_cannot_be_changed_after_the_fact(stored, change, told):
    directory, config = stored
    before = files(directory)
    if "run" in change:
        change = {"run": replace(config.run, seed=1)}
    with pytest.raises(ConfigError) as caught:
        continue_configuration(directory, replace(config, **change), 40, 100)
    message = str(caught.value)
    assert told in message and "has finished 40 steps" in message
    assert "set them back to go on, or choose another run.directory" in message
    assert caught.value.exit_code == ExitCode.CONFIG and files(directory) == before


def test_fewer_steps_than_are_done_are_refused(stored):
    directory, config = stored
    shorter = replace(config, training=Training(steps=50))
    with pytest.raises(ConfigError, match="finished 100 steps and would end at step 50 .*was 100"):
        continue_configuration(directory, shorter, 100, 50)
    assert list(files(directory)) == ["config.yaml"]


def test_more_steps_go_on_and_say_so_and_the_old_settings_are_kept(stored):
    directory, config = stored
    before = files(directory)["config.yaml"]
    (line,) = continue_configuration(directory, replace(config, training=Training(200)), 100, 200)
    assert line == (
        "training.steps was 100 and is 200 after step 100, and so is the length that the learning "
        "rate's schedule goes by (before: config.1.yaml)"
    )
    assert files(directory)["config.1.yaml"] == before
    assert "steps: 200" in files(directory)["config.yaml"]


def learning(config, total: int):
    """As much of a learner as a check of its learning rate looks at."""
    return SimpleNamespace(optimizer=SimpleNamespace(rate=build(config, 0.1, total), peak=0.1))


@pytest.mark.parametrize(
    ("schedule", "step", "total", "accepted"),
    [
        (Constant(), 100, 200, True),
        (WSD(10, 0.2), 80, 200, True),
        (WSD(10, 0.2), 81, 200, False),  # the decay had begun
        (WSD(10, 0.2), 81, 90, False),  # it would have begun before
        (Cosine(10), 100, 200, False),
        (Cosine(10), 60, 200, False),
        (Cosine(10), 10, 200, True),  # still warming up
    ],
    ids=lambda v: getattr(v, "kind", None),
)
def test_a_length_that_would_have_given_finished_steps_another_rate_is_refused(
    schedule, step, total, accepted
):
    rates = {"lr": float(build(schedule, 0.1, 100)(step - 1))}
    with nullcontext() if accepted else pytest.raises(ConfigError) as caught:
        check_rates({"model": learning(schedule, total)}, rates, step, "runs/a")
    if not accepted:
        assert f"step {step} of runs/a had the learning rate" in str(caught.value)
        assert "run.branch_from runs/a@STEP" in str(caught.value)


def test_every_learner_has_its_own_rate():
    learners = {"actor": learning(Constant(), 9), "critic": learning(Cosine(0), 9)}
    good = {"lr/actor": 0.1, "lr/critic": float(build(Cosine(0), 0.1, 9)(4))}
    check_rates(learners, good, 5, "runs/a")
    with pytest.raises(ConfigError, match="rate 0.2; with the length"):
        check_rates(learners, good | {"lr/critic": 0.2}, 5, "runs/a")


def test_a_branch_may_have_another_length_and_rate_and_nothing_else(stored, tmp_path):
    directory, config = stored
    branch = Branch(f"{directory.path}@40", to_plain(config))
    with RunDirectory(tmp_path / "branch") as other:
        new = replace(
            config,
            run=replace(config.run, directory=str(other.path), branch_from=branch.name),
            training=Training(60),
        )
        lines = continue_configuration(other, new, 40, 60, branch)
        assert [line.split(" was ")[0] for line in lines] == ["training.steps"]
        with pytest.raises(ConfigError, match="@40 has finished 40 .*\n  optimizer.clip was null"):
            changed = replace(new, optimizer=Optimizer(clip=1.0))
            continue_configuration(other, changed, 40, 60, branch)
        with pytest.raises(ConfigError, match="run.branch_from was .*@40 and is null"):
            again = replace(new, run=replace(new.run, branch_from=None))
            continue_configuration(other, again, 50, 60)


def test_how_a_run_is_computed_watched_and_evaluated_may_change_and_is_told(stored):
    directory, config = stored
    changed = replace(
        config,
        training=Training(accumulation=2),
        evaluation=Evaluation(5),
        run=replace(config.run, logging=replace(config.run.logging, every=1)),
    )
    lines = continue_configuration(directory, changed, 100, 100)
    assert [line.split(" was ")[0] for line in lines] == [
        "run.logging.every",
        "training.accumulation",
        "evaluation.every_steps",
    ]


def test_before_the_first_checkpoint_everything_may_change(stored):
    directory, config = stored
    (line,) = continue_configuration(directory, replace(config, optimizer=Optimizer(0.2)), 0, 100)
    assert line == "optimizer.rate was 0.1 and is 0.2 after step 0 (before: config.1.yaml)"


def test_a_setting_that_came_later_stands_at_its_default(stored):
    directory, config = stored
    text = directory.config.read_text()
    directory.config.write_text(text.replace("  clip: null\n", ""))
    assert continue_configuration(directory, config, 100, 100) == []
    directory.config.write_text(text.replace("  clip: null\n", ""))
    with pytest.raises(ConfigError, match=r"optimizer\.clip was null and is 1\.0"):
        continue_configuration(directory, replace(config, optimizer=Optimizer(clip=1.0)), 9, 100)


def test_a_setting_that_is_no_longer_there_is_named(stored):
    directory, config = stored
    directory.config.write_text(directory.config.read_text() + "warp: 9\n")
    with pytest.raises(ConfigError, match=r"warp was 9 and is \(not set\)"):
        continue_configuration(directory, config, 100, 100)


def test_other_processes_refuse_alike_and_write_nothing(stored):
    directory, config = stored
    other = RunDirectory(directory.path, primary=False)
    with pytest.raises(ConfigError, match="optimizer.rate was"):
        continue_configuration(other, replace(config, optimizer=Optimizer(0.2)), 40, 100)
    continue_configuration(other, replace(config, training=Training(200)), 40, 200)
    assert list(files(directory)) == ["config.yaml"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quick", PretrainConfig),
        ("toy_flow", FlowMatchingConfig),
        ("rl", RLConfig),
    ],
)
def test_every_setting_of_every_loop_is_either_free_or_fixed(tmp_path, name, kind):
    """A real run goes on with its own configuration, and not with another rate."""
    from step_jax.core.config import load_file

    shutil.copytree(REAL / name, tmp_path / name)
    config = load_file(kind, tmp_path / name / "config.yaml")
    steps = config.training.steps
    with RunDirectory(tmp_path / name) as directory:
        assert continue_configuration(directory, config, steps, steps) == []
        other = dataclasses.replace(config.optimizer, learning_rate=0.5)
        with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was"):
            continue_configuration(directory, replace(config, optimizer=other), steps, steps)
        free = replace(config, run=replace(config.run, max_skipped=9))
        assert len(continue_configuration(directory, free, steps, steps)) == 1


@pytest.mark.parametrize("name", ["quick", "toy_flow", "rl"])
def test_a_real_run_that_is_done_is_called_done(name):
    assert outcome(read_metrics(REAL / name), running=False) == ("done", "")
    assert outcome(read_metrics(REAL / name), running=True).status == "running"


def test_a_run_that_left_no_word_was_killed():
    records = read_metrics(REAL / "quick")
    cut = [r for r in records if r["step"] <= 500]
    assert outcome(cut, running=False).status == "killed"
    assert outcome([r for r in cut if r["event"] == "note"], running=False).status == "not started"
    again = [*records, {"event": "resumed", "step": 1000, "dropped": 0}]
    assert outcome(again, running=False).status == "killed"


def test_the_last_word_counts():
    done = read_metrics(REAL / "quick")
    failed = {"event": "end", "step": 1000, "status": "failed", "reason": "DiskFullError: full"}
    assert outcome([*done, failed], running=False) == ("failed", "DiskFullError: full")
    assert ending(None) == ("done", "") and ending(KeyboardInterrupt()).status == "interrupted"


def test_flat_configuration():
    text = "a: {b: 1e-3, c: [x, {d: null}]}\n"
    assert flat_configuration(text) == {"a.b": "1e-3", "a.c.0": "x", "a.c.1.d": "null"}
