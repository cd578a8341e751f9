"""Running a loop through the command line on chosen devices, and looking at what it did."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
import pytest

from step_jax.cli.main import main
from step_jax.core.sharding import Sharding
from step_jax.runs.session import Session

LEFT_OUT = {
    "event",
    "time",
    "step_s",
    "data_wait_s",
    "mfu",
    "rollout_s",
    "verifying_s",
    "rollout_wait_s",
}
LEFT_OUT |= {
    f"{unit}_per_s"
    for unit in (
        "tokens",
        "clips",
        "pairs",
        "choices",
        "frames",
        "packs",
        "answers",
        "rollout_tokens",
    )  # fmt: skip
}


class PowerCut(RuntimeError):
    pass


def run_loop(
    command: str, recipe: str, *flags: str, devices: int = 1, cut_after: int | None = None
):
    """Runs a command line on the first devices; returns the last state as NumPy arrays.

    ``cut_after``: the run dies right after this step.
    """
    last = {}
    finished = Session.finished

    def watched(self, step, state, metrics, *rest, **named):
        last["state"] = jax.device_get(state)
        finished(self, step, state, metrics, *rest, **named)
        if step == cut_after:
            self.flush()
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch, on_devices(devices):
        patch.setattr(Session, "finished", watched)
        with pytest.raises(PowerCut) if cut_after else contextlib.nullcontext():
            assert main([command, recipe, *flags]) == 0
    return last.get("state")


@contextlib.contextmanager
def on_devices(count: int):
    """Every mesh is one of the first devices, as if there were no others."""
    build = Sharding.build

    def on_some(parallel, chosen=None):
        return build(parallel, jax.devices()[:count] if chosen is None else chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sharding, "build", staticmethod(on_some))
        yield


def steps(run: Path) -> list[dict]:
    """The numbers of every step, without what a clock measured."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in LEFT_OUT} for r in records if r["event"] == "step"
    ]
