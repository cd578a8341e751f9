"""A pod's network is cut while a run trains: both sides end soon, and it ends in the same bits."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from step_jax.cli.arguments import load_recipe
from step_jax.core.errors import ExitCode, exit_of
from step_jax.launch.target import load_target, make_job
from step_jax.runs.metrics_log import read_metrics
from tests.launch.pod_box import Pod, missing, pods

ROOT = Path(__file__).parents[2]
STEPS = 120
RECIPE = f"""
base: {ROOT}/configs/toys/pretrain.yaml
run: {{directory: {{folder}}/run, checkpoint: {{every_steps: 20}}, logging: {{sinks: []}}}}
model:
  width: 32
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mha, heads: 2, kv_heads: 1, head_dim: 16}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: {STEPS}}}
data: {{path: {ROOT}/step_jax/core, vocab_size: 512, sequence_length: 64, cache_dir: {{folder}}/c}}
parallel: {{fsdp: 2}}
"""
TARGET = """
name: box
place: {kind: gke, topology: "v5p:2x2x2", image: none}
environment: {JAX_PLATFORMS: cpu}
save_s: 10
"""

#: what tells of it: a collective that fails, or JAX's heartbeat
NOTICED = ("another process is gone, or cannot be reached", "detected fatal errors")

pytestmark = [
    pytest.mark.system,
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(why := missing()), reason=why),
]


def jobset(folder: Path) -> str:
    """What `step-jax launch` would submit, of a slice of two hosts."""
    folder.mkdir()
    (folder / "mine.yaml").write_text(RECIPE.replace("{folder}", str(folder)))
    (folder / "target.yaml").write_text(TARGET)
    target = load_target(folder / "target.yaml")
    _, config = load_recipe([str(folder / "mine.yaml")], [], prog="test")
    job = make_job(target, config, "pretrain", "mine.yaml", folder / "launches")
    return target.place.render(job).files["jobset.yaml"]


def start(both: list[Pod]) -> None:
    image = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": os.environ["HOME"],
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    for pod in both:
        pod.start(image)


def losses(folder: Path) -> dict[int, float]:
    if not (folder / "run" / "metrics.jsonl").exists():
        return {}
    return {r["step"]: r["loss"] for r in read_metrics(folder / "run") if r["event"] == "step"}


def said(pod: Pod) -> str:
    return pod.log.read_text(errors="replace")


def trained(folder: Path, both: list[Pod], steps: int) -> None:
    deadline = time.monotonic() + 600
    while max(losses(folder), default=0) < steps:
        assert all(pod.process.poll() is None for pod in both), [said(pod) for pod in both]
        assert time.monotonic() < deadline, [said(pod) for pod in both]
        time.sleep(0.1)


def test_a_partition_ends_both_sides_within_a_minute_and_a_restart_ends_in_the_same_bits(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with pods(jobset(whole), whole) as both:
        start(both)
        assert [pod.ended(600) for pod in both] == [0, 0], [said(pod) for pod in both]
    with pods(jobset(torn), torn) as both:
        start(both)
        trained(torn, both, 30)
        both[1].cut()
        cut = time.monotonic()
        codes = [pod.ended(60 - (time.monotonic() - cut)) for pod in both]
        print("ended after", time.monotonic() - cut, codes)
        assert max(losses(torn)) < STEPS
        for pod, code in zip(both, codes, strict=True):
            assert exit_of(code).again == "counted", said(pod)
            assert any(text in said(pod) for text in NOTICED), said(pod)
        assert "process 1 of 2 on box-slice-0-1.box: process 0 has not answered" in said(both[1])
        both[1].heal()
        start(both)
        assert [pod.ended(600) for pod in both] == [ExitCode.OK] * 2, [said(pod) for pod in both]
    assert "resumed after step" in said(both[0])
    assert list(losses(torn)) == list(range(1, STEPS + 1))
    assert losses(torn) == losses(whole)  # floats as they were written: all bits
