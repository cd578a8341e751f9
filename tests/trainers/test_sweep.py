"""Sweeps: every combination once, what is finished kept, the best named with its place."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from step_jax.cli import main as cli
from step_jax.core.errors import ConfigError
from step_jax.runs.plots import plot_values
from step_jax.trainers import variants
from step_jax.trainers.sweep import Point, Sweep, collect_sweep, load_sweep, run_sweep
from step_jax.trainers.variants import Values
from step_jax.training.step import DivergedError
from tests.trainers.test_ablation import TINY, hash_word

RATES = Values("optimizer.learning_rate", ("1e-3", "3e-3", "1e-2"))
WIDTHS = Values("model.width", ("16", "32"))


@pytest.fixture
def recipe(tmp_path):
    """A recipe of three steps, and texts for it."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        words = [f"{hash_word(i * k)} is {hash_word(k)}" for k in range(60)]
        (tmp_path / f"text/{i}.txt").write_text(f"text {i}: " + ", ".join(words))
    places = {"runs": tmp_path / "runs", "text": tmp_path / "text", "cache": tmp_path / "cache"}
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY.format(**places))
    return path


def point(value, *losses, seeds=None, **changes):
    runs = {seed: Path(f"seed_{seed}") for seed in range(seeds or len(losses))}
    found = Point((value,), 1000, 900, 128, dict(enumerate(losses)), runs)
    return replace(found, **changes)


# --- what is varied ---------------------------------------------------------------------------


def test_values_are_read_as_they_are_written():
    parsed = Values.parse("optimizer.learning-rate=1e-2, 3e-3,0.003", "--vary")
    assert parsed == Values("optimizer.learning_rate", ("0.003", "1e-2"))
    names = Values.parse("optimizer.kind=muon,adamw", "--vary")
    assert names.values == ("muon", "adamw") and not names.border("muon")
    assert not Values("model.width", ("16",)).border("16")  # from Python: it is not varied
    lists = Values.parse("a.betas=[0.9, 0.95],[0.9, 0.99]", "--vary")
    assert lists.values == ("[0.9, 0.95]", "[0.9, 0.99]")
    assert Values.parse("init_from.artifact=runs/a,runs/b", "--vary").folder("runs/a") == (
        "artifact_runs%2Fa"
    )


def test_of_several_keys_every_combination_is_trained(recipe, tmp_path):
    plan, combinations = load_sweep([recipe], [RATES, WIDTHS])
    assert list(combinations.values())[:3] == [("1e-3", "16"), ("1e-3", "32"), ("3e-3", "16")]
    name = "learning_rate_3e-3/width_32"
    run = plan.of_seed(name, None, 1)
    assert (run.optimizer.learning_rate, run.model.width, run.run.seed) == (3e-3, 32, 1)
    assert run.run.directory == str(tmp_path / "runs" / name / "seed_1")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--vary", "optimizer.learning_rate=1e-3,3e-3"], "name a recipe before the options"),
        (["{recipe}"], "say what to vary"),
        (["{recipe}", "--vary", "optimizer.learning_rate=1e-3"], "two or more values"),
        (["{recipe}", "--vary", "optimizer.learning_rate=1e-3,0.001"], "two or more values"),
        (["{recipe}", "--vary", "optimizer.rate=1,2"], "unknown option --optimizer.rate"),
        (["{recipe}", "--vary", "optimizer.learning_rate=1e-3,fast"], "'fast'"),
        (["{recipe}", "--vary", "optimizer.learning_rate=1e-3,-1"], "-1"),
        (["{recipe}", "--vary", "model.width=16,32", "--vary", "model.width=8,9"], "varied twice"),
        (["{recipe}", "--vary", "run.seed=0,1"], "run.seed says how a run is kept.*--seeds N"),
        (["{recipe}", "--vary", "training.batch_size=8,16"], "tokens.*one `training.tokens`"),
        (["{recipe}", "--vary", "data.vocab_size=300,310"], "differ in their tokenizer"),
        (["{recipe}", "--vary", "model.width=16,32", "--seeds", "0"], "at least 1"),
        (["{recipe}", "--vary", "model.width=16,32", "--seed", "2"], "unknown option --seed"),
        (["{sft}", "--vary", "optimizer.learning_rate=1e-3,3e-3"], "loop"),
    ],
)
def test_bad_input(argv, message, recipe, tmp_path, capsys):
    places = {"{recipe}": str(recipe), "{sft}": "configs/sft/lora.yaml"}
    assert cli.main(["sweep", *(places.get(a, a) for a in argv)]) == 78
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (tmp_path / "runs").exists()


def test_a_length_may_be_what_is_varied(recipe):
    _, combinations = load_sweep([recipe], [Values("training.steps", ("3", "6"))])
    assert len(combinations) == 2


def test_a_folder_that_is_a_run_takes_no_sweep(recipe, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/config.yaml").write_text("")
    with pytest.raises(ConfigError, match="holds a run.*--run.directory"):
        run_sweep([recipe], [RATES])


# --- what is found ----------------------------------------------------------------------------


def test_the_best_value_is_named_and_where_it_lies():
    inner = Sweep((RATES,), (point("1e-3", 3.0), point("3e-3", 2.0), point("1e-2", 2.5)))
    assert inner.best.values == ("3e-3",) and inner.border == ()
    text = inner.markdown()
    assert "| **3e-3** | 2.0000 | - |" in text and "| 1e-2 | 2.5000 | +0.5000 |" in text
    assert "Best: optimizer.learning_rate 3e-3." in text and "border" not in text
    outer = Sweep((RATES,), (point("1e-3", 3.0), point("3e-3", 2.0), point("1e-2", 1.5)))
    assert "learning_rate, 1e-2, lies at the border of what was tried" in outer.markdown()
    assert outer.plain()["border"] == ["optimizer.learning_rate"]


def test_of_several_seeds_the_noise_is_said():
    near, far = point("3e-3", 2.0, 2.2, 2.1), point("1e-2", 2.01, 2.19, 2.11)
    sweep = Sweep((RATES,), (point("1e-3", 3.0, 3.2, 3.1), near, far))
    assert sweep.best is near
    text = sweep.markdown()
    assert "2.1000 ± 0.1000" in text and "+1.0000 [+1.0000, +1.0000] *" in text
    assert "Within the noise of the seeds: optimizer.learning_rate 1e-2." in text


def test_what_diverged_counts_as_infinite():
    some = point("1e-2", 1.0, math.inf)
    sweep = Sweep((RATES,), (point("1e-3", 3.0, 3.1), point("3e-3", 2.0, 2.1), some))
    assert sweep.best.values == ("3e-3",)
    assert "| 1e-2 | 1.0000 (1 of 2 diverged) | -1.0000 |" in sweep.markdown()
    assert json.loads(json.dumps(sweep.plain(), allow_nan=False))["points"][2]["loss"] == "inf"
    none = Sweep((RATES,), tuple(point(v, math.inf) for v in RATES.values))
    assert none.best is None and "Every run diverged." in none.markdown()


def test_what_is_not_finished_is_no_best():
    sweep = Sweep((RATES,), (point("1e-3", 3.0, 3.1), point("3e-3", 2.0, seeds=2)))
    assert sweep.best.values == ("1e-3",)
    assert "No combination is finished." in Sweep((RATES,), (point("1e-3", seeds=1),)).markdown()


def test_sizes_and_lengths_stand_in_the_table_where_they_differ():
    points = (point("16", 2.0), point("32", 1.9, parameters=4000, tokens=256))
    assert "| 32 | 4,000 | 256 |" in Sweep((WIDTHS,), points).markdown().replace("**", "")


# --- the picture ------------------------------------------------------------------------------


def axes_of(monkeypatch, curves, tmp_path, **options):
    """The axes as they are when the picture is written."""
    kept = []
    monkeypatch.setattr("step_jax.runs.plots._save", lambda figure, out: kept.append(figure))
    plot_values(curves, tmp_path / "x.png", key="rate", label="loss", **options)
    return kept[0].axes[0]


def test_rates_stand_on_a_log_axis_at_the_values_that_were_tried(monkeypatch, tmp_path):
    curve = [("1e-3", [3.0, 3.2]), ("3e-3", [2.0, 2.2]), ("1", [math.inf, 4.0])]
    axes = axes_of(monkeypatch, {"": curve}, tmp_path, best=("", "3e-3"))
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "rate (log scale)"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1e-3", "3e-3", "1"]
    each, means, cross, ring, of_legend = axes.lines
    assert list(each.get_ydata()) == [3.0, 3.2, 2.0, 2.2, 4.0]
    assert list(means.get_ydata()) == pytest.approx([3.1, 2.1])
    assert (cross.get_marker(), list(cross.get_xdata())) == ("x", [1.0])
    assert (ring.get_label(), list(ring.get_xdata())) == ("best: 3e-3", [3e-3])
    assert of_legend.get_label() == "diverged"


def test_names_stand_side_by_side_and_other_values_are_curves(monkeypatch, tmp_path):
    curves = {"width 16": [("muon", [2.0]), ("adamw", [2.1])], "width 32": [("muon", [1.9])]}
    axes = axes_of(monkeypatch, curves, tmp_path)
    assert axes.get_xscale() == "linear" and list(axes.get_xticks()) == [0, 1]
    assert {line.get_linestyle() for line in axes.lines} == {"None"}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["width 16", "width 32"]


def test_zero_is_no_place_on_a_log_axis(monkeypatch, tmp_path):
    axes = axes_of(monkeypatch, {"": [("0", [2.0]), ("0.1", [1.9])]}, tmp_path)
    assert axes.get_xscale() == "linear"
    with pytest.raises(ValueError, match="no finite result"):
        plot_values({"": [("0", [math.inf])]}, tmp_path / "x.png", key="", label="")


# --- running ----------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_stopped(recipe, tmp_path, monkeypatch, capsys):
    """Its first start is interrupted in the third run; a rate of 1e-2 diverges."""
    known, started = {}, []

    def train(config):
        rate, folder = config.optimizer.learning_rate, Path(config.run.directory)
        started.append((rate, config.run.seed))
        if len(started) == 3:
            raise KeyboardInterrupt
        if rate > 5e-3:
            folder.mkdir(parents=True)
            end = {"event": "end", "step": 2, "status": "failed", "reason": "DivergedError: no"}
            (folder / "metrics.jsonl").write_text(json.dumps(end))
            raise DivergedError("no")
        known[config.run.directory] = 1.0 + abs(rate - 3e-3) + config.run.seed
        return {"nll": known[config.run.directory]}

    monkeypatch.setattr(variants.pretrain, "run", train)
    monkeypatch.setattr(variants, "finished", lambda config: known.get(config.run.directory))
    vary = "optimizer.learning_rate=3e-3,1e-3,1e-2"
    argv = ["sweep", str(recipe), "--vary", vary, "--seeds", "2"]
    assert cli.main(argv) == 130
    assert started == [(1e-3, 0), (3e-3, 0), (1e-2, 0)]
    assert collect_sweep([recipe], [RATES], (0,)).best.values == ("3e-3",)
    assert cli.main(argv) == 0 and started[3:] == [(1e-2, 0), (1e-3, 1), (3e-3, 1), (1e-2, 1)]
    assert cli.main(argv) == 0 and len(started) == 7
    out = capsys.readouterr().out
    assert "learning_rate_1e-2, seed 0: diverged" in out
    assert "Best: optimizer.learning_rate 3e-3." in out and "| 1e-2 | diverged | - |" in out
    runs = tmp_path / "runs"
    assert (runs / "sweep.md").read_text() in out
    assert json.loads((runs / "sweep.json").read_text())["best"] == {
        "optimizer.learning_rate": "3e-3"
    }
    assert (runs / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_which_every_run_diverges_says_so(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "tried_loss", lambda config: math.inf)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="every run of the sweep diverged: see .*sweep.md"):
        run_sweep([recipe], [RATES], say=lambda line: None)
    assert "Every run diverged." in (tmp_path / "runs/sweep.md").read_text()
