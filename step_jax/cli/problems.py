"""``step-jax problems [FILE.yaml ...] [--key VALUE ...]``: problems and their worked solutions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from step_jax.core import checks
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.storage import local
from step_jax.environments.problems import Problem
from step_jax.environments.replies import Thinking
from step_jax.environments.tasks import TaskConfig

_DESCRIPTION = """Write problems of a task with their worked solutions. OUT/train.jsonl is for
`step-jax sft` (form: chat) or `step-jax pretrain` (form: text); OUT/heldout.jsonl has questions and
answers of the held-out side, none of which is ever in the first, whatever the seed."""


@dataclass(frozen=True)
class ProblemsConfig(TaskConfig):
    """What to write.

    out: the folder.
    count: problems to train on.
    heldout: held-out problems.
    seed: of those to train on.
    form: ``chat`` for conversations, ``text`` for the question and the reply as one text.
    """

    out: str = "problems"
    count: int = 10_000
    heldout: int = 200
    seed: int = 0
    form: Literal["chat", "text"] = "chat"

    def validate(self):
        super().validate()
        checks.at_least(self, count=1, heldout=0)
        checks.seed(self.seed)


def parse(argv: list[str]) -> ProblemsConfig:
    return load_config(
        ProblemsConfig, argv, prog="step-jax problems", description=_DESCRIPTION
    ).config


def run(config: ProblemsConfig) -> None:
    problems = config.open()
    out = local(config.out, "--out")
    drawn = [problems.train(config.seed, index) for index in range(config.count)]
    train = [problem for problem in drawn if problem.answer is not None]
    if not train:
        raise ConfigError(f"{drawn[0].name} has no worked answers to write, only a verifier")
    _write(out / "train.jsonl", (_record(problem, config) for problem in train))
    if config.heldout:
        held = problems.heldout(config.heldout)
        _write(out / "heldout.jsonl", ({"question": p.question, "answer": p.answer} for p in held))
    left_out = len(drawn) - len(train)
    print(
        f"{len(train):,} problems ({len({p.content for p in train}):,} different) and "
        f"{config.heldout:,} held out, in {out}"
        + (f"; {left_out:,} have no worked answer and are left out" if left_out else "")
    )


def _record(problem: Problem, config: ProblemsConfig) -> dict[str, Any]:
    thinking = getattr(config.task, "thinking", Thinking())
    if config.form == "chat":
        return problem.solved(thinking)
    return {"text": problem.question + problem.reply(thinking)}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
