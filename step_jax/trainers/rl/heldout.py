"""How a policy does on problems that it is not trained on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from step_jax.core.errors import ConfigError
from step_jax.environments.pool import Pool
from step_jax.environments.problems import Problem, Problems
from step_jax.models.text.decoder import Decoder
from step_jax.runs.session import Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.config import Config
from step_jax.trainers.rl.rollouts import evaluated, make_engine


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
    ):
        self._config, self._session, self._pool = config.evaluation, session, pool
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
        self._engine = make_engine(
            config, policy, tokenizer, session.sharding, config.evaluation.temperature
        )

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
        """The mean score with its standard error over problems, the best of n, lengths."""
        n = self._config.samples
        done = evaluated(self._engine, params, self._prompts, n, self._tokens, step)
        replies = [
            [self._tokenizer.decode_continuation(c.request.prompt, c.tokens) for c in group]
            for group in done
        ]
        scores_PN = np.zeros((len(done), n), np.float32)
        if self._pool is not None:
            asked = [(r, p.record) for p, group in zip(self._asked, replies, strict=True)
                     for r in group]  # fmt: skip
            scores = self._pool.score(asked)
            scores_PN = np.asarray([s.total for s in scores], np.float32).reshape(-1, n)
        if jax.process_count() > 1:
            scores_PN = multihost_utils.broadcast_one_to_all(scores_PN)
        mean_P = scores_PN.mean(1)
        error = statistics.stdev(mean_P.tolist()) / len(mean_P) ** 0.5 if len(mean_P) > 1 else 0.0
        tokens = [len(c.tokens) for group in done for c in group]
        cut = [c.reason != "stop" for group in done for c in group]
        return {
            "score": float(mean_P.mean()),
            "score_error": error,
            f"best_of_{n}": float(scores_PN.max(1).mean()),
            "answer_tokens": float(np.mean(tokens)),
            "truncated_share": float(np.mean(cut)),
        }
