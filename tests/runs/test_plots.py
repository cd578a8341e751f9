"""Pictures from records: what is drawn is what was recorded."""

from pathlib import Path

import pytest

from step_jax.runs import plots
from step_jax.runs.metrics_log import MetricsLog, read_metrics
from step_jax.runs.plots import plot_comparison, plot_run, series, smooth

REAL = Path(__file__).parent / "real"


@pytest.fixture
def run(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        loss = float("nan") if step == 7 else 4.0 / step
        values = {"loss": loss, "tokens": 100 * step, "lr": 1e-3, "tokens_per_s": 5e4}
        log.append("step", step, values)
    log.append("eval", 40, {"name": "held-out", "loss": 0.2, "tokens": 4000})
    log.close()
    return tmp_path


def test_series_are_the_finite_points(run):
    xs, ys = series(read_metrics(run), "step", "tokens", "loss")
    assert len(xs) == 39 and 700.0 not in xs
    assert (xs[0], ys[0], xs[-1], ys[-1]) == (100.0, 4.0, 4000.0, 0.1)


def test_an_evaluation_stands_where_it_was_made_and_not_at_its_own_size():
    records = read_metrics(REAL / "quick")
    xs, ys = series(records, "eval", "tokens", "loss")
    assert xs == [204_800, 409_600, 614_400, 819_200, 1_024_000]
    assert {r["tokens"] for r in records if r["event"] == "eval"} == {38_346, 93_230}
    assert ys[0] == pytest.approx(5.4924, abs=1e-3) and ys[-1] == pytest.approx(4.3379, abs=1e-3)
    assert series(records, "eval", "tokens", "loss", "final")[0] == [1_024_000]
    assert series(records, "eval", "step", "loss")[0] == [200, 400, 600, 800, 1000]
    # a step whose record was lost: by the steps around it, or at the pace so far
    steps = [{"event": "step", "step": s, "tokens": 10 * s, "loss": 1.0} for s in (10, 20)]
    for step, expected in ((5, 50), (15, 150), (20, 200), (30, 300)):
        evaluation = {"event": "eval", "step": step, "name": "heldout", "loss": 1.0}
        assert series([*steps, evaluation], "eval", "tokens", "loss")[0] == [expected]


def test_smooth():
    assert smooth([1.0] * 10, 4) == [1.0] * 10
    line = [float(i) for i in range(20)]
    assert smooth(line, 6)[3:17] == line[3:17]  # a centred window has no lag
    assert smooth([5.0, 1.0, 1.0], 1) == [5.0, 1.0, 1.0]


def test_pictures(run, tmp_path):
    from PIL import Image

    for path in (
        plot_run(run, tmp_path / "plots" / "loss.png"),
        plot_comparison({"one": run, "two": run / "metrics.jsonl"}, tmp_path / "both.png"),
    ):
        with Image.open(path) as image:
            colours = {rgb for _, rgb in image.convert("RGB").getcolors(1 << 24)}
            assert image.width >= 1000
            assert (0x00, 0x72, 0xB2) in colours  # the curve


def drawn(monkeypatch):
    """Collects the figures that are written instead of their files."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: figures.append(figure) or out)
    return figures


def curves(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def test_sixteen_runs_can_be_told_apart_and_the_legend_covers_nothing(monkeypatch):
    figures = drawn(monkeypatch)
    plot_comparison({f"run {i}": REAL / "quick" for i in range(16)}, "x.png")
    (axes,) = figures[0].axes
    looks = {(line.get_color(), line.get_linestyle()) for line in curves(axes)}
    assert len(looks) == 16 and len(curves(axes)) == 16
    figures[0].draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == sorted(f"run {i}" for i in range(16))
    with pytest.raises(ValueError, match="60 runs in one picture: 48 can be told apart"):
        plot_comparison({str(i): REAL / "quick" for i in range(60)}, "x.png")


def test_unlike_losses_do_not_share_an_axis(monkeypatch):
    figures = drawn(monkeypatch)
    plot_comparison({n: REAL / n for n in ("quick", "toy_flow", "rl")}, "x.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == [
        "loss (nats per token); points: evaluations",
        "loss (squared error of a number)",
        "loss (of the policy's objective)",
    ]
    assert [len(curves(axes)) for axes in figures[0].axes] == [1, 1, 1]
    assert len({curves(axes)[0].get_color() for axes in figures[0].axes}) == 3


def test_the_unit_is_the_one_that_the_run_recorded(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("header", 0, {"values": {}, "units": {"loss": "squared error"}})
    for step in range(1, 5):
        log.append("step", step, {"loss": 1.0, "images": 64 * step, "images_per_s": 1.0})
    log.close()
    figures = drawn(monkeypatch)
    plot_run(tmp_path, "x.png")
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "loss (squared error)"
    assert axes.get_xlabel() == "images trained on"


def test_evaluations_of_unlike_texts_are_told_apart(monkeypatch):
    figures = drawn(monkeypatch)
    plot_run(REAL / "quick", "x.png")
    lines = {line.get_label(): line for line in curves(figures[0].axes[0])}
    assert list(lines) == ["training", "heldout (38.3k tokens)", "final (93.2k tokens)"]
    assert lines["final (93.2k tokens)"].get_xdata() == [1_024_000]
    assert len({line.get_marker() for line in lines.values()}) == 3


def test_a_run_that_diverged_says_so_and_does_not_flatten_the_others(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for record in read_metrics(REAL / "quick"):
        if record["event"] == "step":
            late = record["step"] - 600
            record["loss"] = float("nan") if late > 200 else record["loss"] * max(1, late) ** 2
            log.append("step", record["step"], {k: record[k] for k in ("loss", "nll", "tokens")})
    log.close()
    figures = drawn(monkeypatch)
    plot_comparison({"good": REAL / "quick", "bad": tmp_path}, "x.png")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in curves(axes)] == ["good", "bad, not finite from step 820"]
    assert axes.get_ylim()[1] < 10
    assert "1 run leaves the picture" in [text.get_text() for text in axes.texts]


def test_missing_metric(run):
    with pytest.raises(ValueError, match="no step record has a finite 'reward'"):
        plot_run(run, run / "x.png", metric="reward")
    with pytest.raises(ValueError, match="none of the runs"):
        plot_comparison({"a": run}, run / "x.png", metric="reward")


def test_accuracy_is_drawn_against_tokens_with_its_intervals(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: drawn.append(figure) or out)
    curves = {
        "votes": [(200.0, 0.5, 0.4, 0.65), (100.0, 0.3, 0.2, 0.4)],
        "rounds": [(400, 1, 1, 1)],
    }
    plots.plot_spending(curves, tmp_path / "a.png", title="sums")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    line, _, (bars,) = axes.containers[0]
    assert line.get_xydata().tolist() == [[100, 0.3], [200, 0.5]]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.2, 0.4]), pytest.approx([0.4, 0.65])]
    with pytest.raises(ValueError, match="no point"):
        plots.plot_spending({"votes": []}, tmp_path / "a.png")


def test_a_picture_of_accuracy_is_written(tmp_path):
    out = plots.plot_spending({"votes": [(100.0, 0.3, 0.2, 0.4)]}, tmp_path / "new/a.png")
    assert out.read_bytes().startswith(b"\x89PNG")
