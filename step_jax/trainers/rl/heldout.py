"""How a policy does on problems that it is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from step_jax.core.errors import ConfigError
from step_jax.environments.pool import Pool
from step_jax.environments.problems import Problem, Problems
from step_jax.environments.replies import conclusion
from step_jax.evaluation import accuracy
from step_jax.models.text.decoder import Decoder
from step_jax.runs.session import Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.config import Config
from step_jax.trainers.rl.layouts import heldout_writer
from step_jax.trainers.rl.rollouts import evaluated
from step_jax.trainers.rl.turns import Turns


class HeldOut:
    """Scores of held-out problems, when they are due."""

    def __init__(
        self,
        config: Config,
        session: Session,
        policy: Decoder,
        tokenizer: Tokenizer,
        problems: Problems,
        encode: Callable[[Problem], list[int]],
        pool: Pool | None,
        turns: Turns | None,
    ):
        self._turns = turns
        self._config, self._session, self._pool = config.evaluation, session, pool
        # what votes; a sum of verifiers votes with whole replies
        self._thinking = getattr(config.problems.checked_by, "thinking", None)
        self._tokenizer, self._tokens = tokenizer, config.rollout.max_new_tokens
        self._asked: list[Problem] = (
            problems.heldout(config.evaluation.problems) if config.evaluation.problems else []
        )
        self._prompts = [encode(problem) for problem in self._asked]
        if long := [p.name for p, ids in zip(self._asked, self._prompts, strict=True)
                    if len(ids) > config.rollout.max_prompt_tokens]:  # fmt: skip
            raise ConfigError(
                f"{len(long)} held-out problems have more than rollout.max_prompt_tokens "
                f"{config.rollout.max_prompt_tokens} tokens, the first of them {long[0]}"
            )
        self._writer = heldout_writer(config, policy, tokenizer, session.sharding)

    def __call__(self, step: int, policy: Any) -> dict[str, float]:
        """The figures of these many finished steps; {} if none are due or they were made."""
        every, session = self._config.every_steps, self._session
        due = step in (0, session.total_steps) or (every and step % every == 0)
        if not (due and self._asked) or session.recorded(step, "heldout"):
            return {}
        with session.aside():
            figures = self.figures(policy, step)
            session.reporter.evaluation(step, figures, "heldout")
        return figures

    def figures(self, params: Any, step: int) -> dict[str, float]:
        """pass@1 with its 95 % interval over problems, pass@n, maj@n, mean score, lengths."""
        n, decode = self._config.samples, self._tokenizer.decode_continuation
        if self._writer.send is not None:
            params = self._writer.send(params)
        written = evaluated(
            self._writer.engine, params, self._prompts, n, self._tokens, step, decode, self._turns
        )
        done = [[sample for sample, _ in group] for group in written]
        replies = [[reply for _, reply in group] for group in written]
        scores_PN = np.zeros((len(done), n), np.float32)
        if self._pool is not None:
            records = (problem.record for problem in self._asked)
            asked = [(r, record) for record, group in zip(records, replies, strict=True)
                     for r in group]  # fmt: skip
            scores = self._pool.score(asked)
            scores_PN = np.asarray([s.total for s in scores], np.float32).reshape(-1, n)
        if jax.process_count() > 1:
            scores_PN = multihost_utils.broadcast_one_to_all(scores_PN)
        samples = accuracy.Samples(
            scores_PN >= self._config.right,
            [[conclusion(reply, self._thinking) for reply in group] for group in replies],
            np.asarray([[len(c.tokens) for c in group] for group in done]),
            np.asarray([[c.finish != "stop" for c in group] for group in done]),
        )
        found = accuracy.measure(samples, sorted({1, n}))
        return {
            "pass@1": found["pass@1"].mean,
            "pass@1_low": found["pass@1"].low,
            "pass@1_high": found["pass@1"].high,
            f"pass@{n}": found[f"pass@{n}"].mean,
            f"maj@{n}": found[f"maj@{n}"].mean,
            "score": float(scores_PN.mean()),
            "answer_tokens": found["tokens"].mean,
            "truncated_share": found["cut"].mean,
        }
