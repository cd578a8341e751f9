"""``step-jax solve ARTIFACT [FILE.yaml ...] [--task.kind KIND ...]``: a model solves problems.

Accuracy against the tokens that were written: votes of more samples, longer thoughts, coordinated
rounds (``inference.test_time``), each with its interval. The replies are kept, one a line.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from step_jax.cli.arguments import artifact_and_options
from step_jax.core import checks
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.storage import local
from step_jax.environments.pacore import Round
from step_jax.environments.pool import Pool
from step_jax.environments.problems import Problem
from step_jax.environments.replies import Thinking, conclusion
from step_jax.environments.tasks import TaskConfig

if TYPE_CHECKING:
    from step_jax.checkpoint.artifact import Artifact
    from step_jax.evaluation.accuracy import Interval, Samples, Spent
    from step_jax.inference.test_time import EngineSampler, Reply, ThinkingBudget, Ways

_DESCRIPTION = """Have a language model solve problems: step-jax solve ARTIFACT --task.kind KIND ...
ARTIFACT is RUN, RUN@STEP or hf:PATH. OUT gets accuracy.json, a picture of accuracy against tokens,
and samples.jsonl, every reply with its score."""


@dataclass(frozen=True)
class SolveConfig(TaskConfig):
    """What is solved, and how.

    out: the folder.
    side: of the problems: ``heldout``, or ``train``.
    problems: how many.
    samples: replies to each; votes are of 1, 2, 4 ... of them.
    max_new_tokens: of a reply, after its thought if that has a budget.
    budgets: tokens after which a thought is closed by force, each tried with as many samples.
    rounds: widths of coordinated rounds (PaCoRe), each tried once: [16, 4] are 16 replies, 4 that
      read their conclusions, and one that reads those.
    round: what a round of several looks like.
    right: the score from which a reply is right.
    chat: ask through the tokenizer's chat template; null if it has one.
    slots: texts that are written at a time.
    part: which of the artifact's models; its first by default.
    """

    out: str = "solved"
    side: Literal["heldout", "train"] = "heldout"
    problems: int = 100
    samples: int = 16
    seed: int = 0
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    budgets: tuple[int, ...] = ()
    rounds: tuple[tuple[int, ...], ...] = ()
    round: Round = Round()
    right: float = 1.0
    chat: bool | None = None
    slots: int = 64
    part: str | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        super().validate()
        checks.at_least(self, problems=1, samples=1, max_new_tokens=1, slots=1, temperature=0)
        checks.seed(self.seed)
        if self.budgets and self.thinking is None:
            raise ConfigError("budgets are of thoughts, and the verifier knows no marks of one")
        if bad := [n for n in self.budgets if n < 1]:
            raise ConfigError(f"budgets has {bad[0]}; a thought needs a token")

    @property
    def thinking(self) -> Thinking | None:
        """The marks of a reply's thought, as its verifier reads them."""
        return getattr(self.checked_by, "thinking", None)

    @property
    def thoughts(self) -> list[ThinkingBudget]:
        """The budgets."""
        from step_jax.inference.test_time import ThinkingBudget

        assert self.thinking is not None or not self.budgets  # see validate
        return [ThinkingBudget(most, thinking=self.thinking) for most in self.budgets]  # type: ignore[arg-type]


def parse(argv: list[str]) -> tuple[str, SolveConfig]:
    """(the artifact's name, what to do with it)."""
    name, options = artifact_and_options(argv, "step-jax solve")
    loaded = load_config(
        SolveConfig, options, prog="step-jax solve ARTIFACT", description=_DESCRIPTION
    )
    return name, loaded.config


def run(asked: tuple[str, SolveConfig]) -> None:
    name, config = asked
    opened = config.open()
    problems = (
        opened.heldout(config.problems)
        if config.side == "heldout"
        else [opened.train(config.seed, index) for index in range(config.problems)]
    )

    from step_jax.inference.test_time import Ways
    from step_jax.interop.artifacts import load_artifact
    from step_jax.models.text.decoder import Decoder

    sharding = Sharding.build(config.parallel).for_inference()
    artifact = load_artifact(name, sharding, config.part)
    artifact.require(Decoder, "step-jax solve")
    print(f"{name}, step {artifact.step}", file=sys.stderr)
    for budget in config.thoughts:
        budget.thought(artifact.tokenizer)  # refuses marks that it cannot tell
    sampler = _sampler(artifact, config, sharding)
    ways = Ways(sampler, config.seed, config.thinking)
    with config.pool() as pool:
        samples, lines = _sampled(ways, config, problems, pool)
        curves = {"votes": _votes(samples)}
        if config.budgets:
            curves["budgets of thoughts"] = list(_budgets(ways, config, problems, pool))
        if config.rounds:
            curves["coordinated rounds"] = list(_rounds(ways, config, problems, pool))
    _write(config, f"{name}, step {artifact.step}", samples, lines, curves)


def _sampler(artifact: Artifact, config: SolveConfig, sharding: Sharding) -> EngineSampler:
    from step_jax.inference.engine import Engine
    from step_jax.inference.sampling import SamplingConfig
    from step_jax.inference.test_time import EngineSampler
    from step_jax.tokenizers.chat import encode_request

    tokenizer = artifact.tokenizer
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat

    def encode(prompt: str) -> list[int]:
        if not chat:
            return tokenizer.encode_prompt(prompt)
        return encode_request(tokenizer, [{"role": "user", "content": prompt}], "a problem")

    ways = sharding.ways("batch")

    @functools.cache
    def engine(length: int) -> Engine:
        return Engine(
            artifact.model,
            SamplingConfig(temperature=config.temperature, top_p=config.top_p),
            slots=-(-config.slots // ways) * ways,
            max_length=length,
            seed=config.seed,
            stop_ids=tokenizer.stop_ids,
            execution=artifact.execution,
            sharding=None if sharding.mesh.size == 1 else sharding,
        )

    return EngineSampler(engine, artifact.params, tokenizer, encode, config.max_new_tokens)


def _judged(
    config: SolveConfig, problems: Sequence[Problem], rows: Sequence[Sequence[Reply]], pool: Pool
) -> tuple[Samples, list[list[float]]]:
    """The replies to each problem, with what they score."""
    import numpy as np

    from step_jax.evaluation.accuracy import Samples

    pairs = [(r.text, p.record) for p, row in zip(problems, rows, strict=True) for r in row]
    n = len(rows[0])
    totals = [score.total for score in pool.score(pairs)]
    scores = [totals[at : at + n] for at in range(0, len(totals), n)]
    samples = Samples(
        np.asarray(scores) >= config.right,
        [[conclusion(reply.text, config.thinking) or None for reply in row] for row in rows],
        np.asarray([[reply.tokens for reply in row] for row in rows]),
        np.asarray([[reply.finish != "stop" for reply in row] for row in rows]),
    )
    return samples, scores


def _sampled(
    ways: Ways, config: SolveConfig, problems: Sequence[Problem], pool: Pool
) -> tuple[Samples, Iterator[dict]]:
    """Every problem's replies, and they as records."""
    asked = [problem.question for problem in problems]
    rows = ways.sample(asked, config.samples, seed=config.seed)
    samples, scores = _judged(config, problems, rows, pool)
    records = (
        {
            "problem": problem.name,
            "question": problem.question,
            "content": problem.content,
            "record": problem.record,
            "answer": problem.answer,
            "reply": reply.text,
            "conclusion": answer,
            "score": score,
            "right": bool(score >= config.right),
            "tokens": reply.tokens,
            "finish": reply.finish,
        }
        for problem, row, answers, of_row in zip(
            problems, rows, samples.answers_PN, scores, strict=True
        )
        for reply, answer, score in zip(row, answers, of_row, strict=True)
    )
    return samples, records


def _votes(samples: Samples) -> list[Spent]:
    from step_jax.evaluation.accuracy import vote_curve

    return vote_curve(samples, [2**i for i in range(samples.count.bit_length())])


def _budgets(
    ways: Ways, config: SolveConfig, problems: Sequence[Problem], pool: Pool
) -> Iterator[Spent]:
    """One reply with a thought of at most so many tokens: the mean of all samples."""
    import numpy as np

    from step_jax.evaluation.accuracy import Spent, bootstrap

    asked = [problem.question for problem in problems]
    for budget in config.thoughts:
        rows = ways.sample(asked, config.samples, seed=config.seed, budget=budget)
        found, _ = _judged(config, problems, rows, pool)
        yield Spent(float(found.tokens_PN.mean()), bootstrap(np.mean(found.correct_PN, axis=1)))


def _rounds(
    ways: Ways, config: SolveConfig, problems: Sequence[Problem], pool: Pool
) -> Iterator[Spent]:
    """The answer after each of the rounds' widths."""
    import numpy as np

    from step_jax.evaluation.accuracy import Spent, bootstrap

    asked = [problem.question for problem in problems]
    for widths in config.rounds:
        chosen = ways.coordinated(asked, widths, config.round)
        replies = [
            one.answer or "" if config.thinking is None or not one.answer
            else config.thinking.write(None, one.answer)
            for one in chosen
        ]  # fmt: skip
        scores = pool.score(list(zip(replies, (p.record for p in problems), strict=True)))
        right_P = np.asarray([score.total >= config.right for score in scores], float)
        tokens = float(np.mean([one.tokens for one in chosen]))
        yield Spent(tokens, bootstrap(right_P))


def _write(
    config: SolveConfig,
    name: str,
    samples: Samples,
    lines: Iterator[dict],
    curves: dict[str, list[Spent]],
) -> None:
    from step_jax.evaluation.accuracy import measure
    from step_jax.runs.plots import plot_spending

    out = local(config.out, "--out")
    ks = sorted({2**i for i in range(samples.count.bit_length())} | {samples.count})
    found = measure(samples, ks)
    write_whole(
        out / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines)
    )
    points = {
        label: [{"tokens": s.tokens, **vars(s.accuracy)} for s in spent]
        for label, spent in curves.items()
    }
    said = {"model": name, "problems": config.problems, "samples": config.samples}
    figures = {key: vars(interval) for key, interval in found.items()}
    write_whole(
        out / "accuracy.json", json.dumps({**said, **figures, "curves": points}, indent=1) + "\n"
    )
    drawn = {label: [spent.drawn for spent in curve] for label, curve in curves.items()}
    plot_spending(drawn, out / "accuracy.png", title=name)
    for key, interval in found.items():
        print(f"{key:<12} {_shown(key, interval)}")
    for label, curve in curves.items():
        for spent in curve:
            print(f"{label:<20} {spent.tokens:>10,.0f} tokens  {spent.accuracy}")
    print(f"in {out}: samples.jsonl, accuracy.json, accuracy.png")


def _shown(key: str, interval: Interval) -> str:
    if key != "tokens":
        return str(interval)
    return f"{interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
