"""Pictures from records: what is drawn is what was recorded."""

import pytest

from step_jax.runs.metrics_log import MetricsLog, read_metrics
from step_jax.runs.plots import plot_comparison, plot_run, series, smooth


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
    assert series(read_metrics(run), "eval", "tokens", "loss") == ([4000.0], [0.2])


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


def test_missing_metric(run):
    with pytest.raises(ValueError, match="no step record has a finite 'reward'"):
        plot_run(run, run / "x.png", metric="reward")
    with pytest.raises(ValueError, match="none of the runs"):
        plot_comparison({"a": run}, run / "x.png", metric="reward")
