"""What a run of reinforcement learning is told: the groups of its recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig
from step_jax.environments.tasks import TaskConfig
from step_jax.environments.tools import Tools
from step_jax.interop.artifacts import InitFrom
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.runs.session import RunConfig
from step_jax.trainers.rl.algorithms import algorithm
from step_jax.trainers.rl.objectives import (
    Algorithm,
    CorrectionKind,
    PolicyKind,
    ReductionKind,
)
from step_jax.trainers.rl.signals import KL, SignalKind
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer


@dataclass(frozen=True)
class AlgorithmConfig:
    """An entry of ``algorithms.ALGORITHMS``, and what is another way here; null leaves it.

    kl: coefficient of the divergence from the reference policy; 0 for none.
    dynamic_sampling: other prompts take the place of those whose answers all score the same.
    """

    name: str = "grpo"
    signal: SignalKind | None = None
    policy: PolicyKind | None = None
    reduction: ReductionKind | None = None
    corrections: tuple[CorrectionKind, ...] | None = None
    kl: float | None = None
    entropy: float | None = None
    dynamic_sampling: bool | None = None

    def validate(self):
        checks.at_least(self, kl=0)
        self.resolved(1)

    def resolved(self, limit: int) -> Algorithm:
        """The algorithm for answers of at most ``limit`` tokens. Raises ConfigError."""
        entry = algorithm(self.name, limit)
        given = {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in ("name", "kl")
        }
        if self.kl is not None:
            given["kl"] = replace(entry.kl or KL(self.kl), coefficient=self.kl) if self.kl else None
        how = replace(entry, **given)
        how.validate()
        return how


@dataclass(frozen=True)
class Training:
    """A batch is ``prompts`` problems, each answered ``samples`` times; it is learned from once.

    steps: optimizer steps.
    updates: optimizer steps for each batch, each on its part of the rows.
    accumulation: microbatches of a step.
    """

    steps: int
    prompts: int = 16
    samples: int = 16
    updates: int = 1
    accumulation: int = 1

    def validate(self):
        checks.at_least(self, steps=1, prompts=1, samples=1, updates=1, accumulation=1)
        pieces = self.updates * self.accumulation
        if (self.prompts * self.samples) % pieces:
            raise ConfigError(
                f"training: {self.prompts} prompts x {self.samples} samples do not divide into "
                f"{self.updates} updates x {self.accumulation} microbatches"
            )
        if self.steps % self.updates:
            raise ConfigError(
                f"training.steps is {self.steps}, no multiple of training.updates {self.updates}: "
                "the last batch would be learned from in part"
            )

    @property
    def rows(self) -> int:
        """Answers of a batch."""
        return self.prompts * self.samples

    @property
    def batches(self) -> int:
        """Batches of the run."""
        return self.steps // self.updates


@dataclass(frozen=True)
class Server:
    """The engine that writes the answers.

    kind: ``vllm`` (started with VLLM_SERVER_DEV_MODE=1, which opens ``/collective_rpc``) or
      ``sglang``.
    url: without ``/v1``.
    model: its name there.
    weights: a folder that the run and the server both see; it holds one version at a time.
    dtype: that the parameters are exported in.
    minutes: that loading them may take.
    """

    kind: Literal["vllm", "sglang"]
    url: str
    model: str
    weights: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    minutes: float = 10.0

    def validate(self):
        checks.above(self, minutes=0)
        if not self.url.startswith(("http://", "https://")) or self.url.rstrip("/").endswith("/v1"):
            raise ConfigError(
                f"rollout.server.url is {self.url!r}: give it as http://host:port, without /v1"
            )


@dataclass(frozen=True)
class Rollout:
    """How answers are written.

    max_prompt_tokens: problems with longer prompts are left out, and counted.
    max_new_tokens: the most that an answer has.
    slots: answers under way at a time.
    temperature: of the draws, and of the policy that is trained.
    lag: batches that are written ahead: a batch is learned from this many batches after the
      parameters that wrote it. 0: what is learned from was written by the policy itself.
    token_budget: tokens after which writing pauses: unfinished answers go on under the next
      parameters (partial rollouts). null: every answer is finished first.
    in_flight: groups under way then; 0 for as many as a batch has.
    replay_routing: mixtures of experts learn with the experts that wrote the answers
      (arXiv 2510.11370).
    chat: problems are asked through the tokenizer's chat template; null if it has one.
    parallel: the mesh that answers are written on, if another than that of training: of the
      ``parallel.spare`` devices that training leaves out (with a lag it writes while the policy
      learns), without any of the same devices laid out otherwise (both take turns).
    server: answers are written by an engine of others, see :class:`Server`; held-out problems are
      answered by our own. With a lag it writes while the policy learns.
    """

    max_new_tokens: int
    max_prompt_tokens: int = 256
    slots: int = 64
    temperature: float = 1.0
    lag: int = 0
    token_budget: int | None = None
    in_flight: int = 0
    replay_routing: bool = False
    chat: bool | None = None
    parallel: MeshConfig | None = None
    server: Server | None = None

    def validate(self):
        checks.at_least(self, max_new_tokens=1, max_prompt_tokens=1, slots=1, lag=0, in_flight=0)
        checks.at_least(self, token_budget=1)
        checks.above(self, temperature=0)
        if self.in_flight and self.token_budget is None:
            raise ConfigError("rollout.in_flight is for rollouts with a token_budget")
        if self.server is not None and (self.parallel is not None or self.replay_routing):
            raise ConfigError(
                "rollout.server writes elsewhere and says nothing of experts: leave "
                "rollout.parallel and replay_routing out"
            )

    @property
    def context(self) -> int:
        """Tokens of the longest text."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True)
class CriticConfig:
    """The critic of an algorithm that has one.

    init_from: a reward model or another decoder; null for the policy's own start with a fresh
      score.
    optimizer: null for that of the policy.
    """

    init_from: InitFrom | None = None
    optimizer: OptimizerConfig | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems, each answered ``samples`` times.

    every_steps: 0 for the beginning and the end alone.
    problems: 0 for no evaluation.
    right: the score from which an answer counts as right.
    """

    every_steps: int = 0
    problems: int = 64
    samples: int = 4
    temperature: float = 1.0
    right: float = 1.0

    def validate(self):
        checks.at_least(self, every_steps=0, problems=0, samples=1, temperature=0)


@dataclass(frozen=True)
class Config:
    """Reinforcement learning on problems whose answers can be verified.

    tokenizer: file of the tokenizer of a fresh model.
    reference: what the KL divergence is measured to; null for the start of the run.
    tools: what replies may call, through the tokenizer's chat template; null for none.
    """

    run: RunConfig
    training: Training
    rollout: Rollout
    problems: TaskConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    model: Decoder | None = None
    init_from: InitFrom | None = None
    tokenizer: str | None = None
    reference: str | None = None
    tools: Tools | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    evaluation: Evaluation = Evaluation()
    loop: Literal["rl"] = "rl"

    def validate(self):
        how, c = self.how, self.training
        if self.model is None and self.init_from is None:
            raise ConfigError("give init_from (what to start from) or a model with a tokenizer")
        if (self.tokenizer is None) != (self.init_from is not None):
            raise ConfigError(
                "tokenizer is for a fresh model, which needs one; what is in init_from has its own"
            )
        self.run.profile.check(c.steps)
        if self.tools is not None and self.rollout.chat is False:
            raise ConfigError("tools are called through the chat template: leave rollout.chat out")
        if c.samples < how.signal.smallest_group:
            raise ConfigError(
                f"training.samples is {c.samples}: {self.algorithm.name} compares the answers to a "
                f"prompt with each other and needs {how.signal.smallest_group} or more"
            )
        if how.critic is None and self.critic != CriticConfig():
            raise ConfigError(f"critic is given, and {self.algorithm.name} has none")
        check_optimizer(self.optimizer, c.steps)
        if self.critic.optimizer is not None:
            check_optimizer(self.critic.optimizer, c.steps)
        if self.rollout.server is not None and not how.corrections:
            raise ConfigError(
                "rollout.server computes otherwise than the trainer, so its answers are those of "
                "another policy: give algorithm.corrections"
            )
        if self.rollout.parallel is None and self.parallel.spare:
            raise ConfigError(
                "parallel.spare leaves devices to rollout.parallel, the mesh that answers are "
                "written on: give both, or leave spare out"
            )
        if how.kl is None and self.reference is not None:
            raise ConfigError("reference is given, and algorithm.kl is 0: nothing would read it")
        if self.evaluation.every_steps % c.updates:
            raise ConfigError(
                f"evaluation.every_steps is {self.evaluation.every_steps}, no multiple of the "
                f"{c.updates} updates of a batch"
            )

    @property
    def how(self) -> Algorithm:
        """The algorithm."""
        return self.algorithm.resolved(self.rollout.max_new_tokens)
