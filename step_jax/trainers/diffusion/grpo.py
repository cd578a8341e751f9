"""The loss of Flow-GRPO (arXiv 2505.05470): steps of a sampler that were better than others.

Shape suffixes: B choices, T tokens, P numbers in a patch, S steps of the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import checks
from step_jax.core.sharding import Sharding
from step_jax.inference.flow import Sampler
from step_jax.models.context import Execution
from step_jax.models.video import flow
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow_policy import Choices, divergence, log_density, step_mean
from step_jax.trainers.rl.objectives import Algorithm, Clip, TokenMean, policy_loss
from step_jax.trainers.rl.signals import GroupRelative
from step_jax.trainers.rl.trajectory import Trajectory
from step_jax.training.losses.flow import REFERENCE, rows_of
from step_jax.training.step import LossOutput, Part


@dataclass(frozen=True)
class FlowGRPO:
    """``-min(r A, clip(r, 1 - c, 1 + c) A) + k KL``, a mean over choices.

    r is the ratio of the densities of a step under the policy and under the one that drew it, the
    geometric mean of those of its numbers (``flow_policy.log_density``); A how much better its clip
    is than those of the same caption, in deviations of their rewards; KL the divergence of the
    step's distribution from the reference's, a mean over numbers too.

    clip: c. Ratios of means over thousands of numbers stay near 1, so it is small.
    kl: k; 0 needs no reference.
    """

    clip: float = 1e-4
    kl: float = 0.0

    def validate(self):
        checks.at_least(self, kl=0)
        self.policy.validate()

    @property
    def policy(self) -> Clip:
        """The term with the ratio."""
        return Clip(self.clip, self.clip)

    @property
    def algorithm(self) -> Algorithm:
        """As reinforcement learning of texts has it: a step is an answer of one token."""
        return Algorithm(GroupRelative(), self.policy, TokenMean())


class Steps(NamedTuple):
    """The steps of a policy's sampler, float32 (S,).

    Attributes:
      start, end: their times.
      deviation: of where they end; 0 of those that are not chosen.
    """

    start: np.ndarray
    end: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, sampler: Sampler, choices: Choices) -> Steps:
        times = sampler.times
        return cls(times[:-1], times[1:], choices.deviations(times))


def velocities(
    params, model: VideoDiT, batch: Mapping[str, jax.Array], steps: Steps,
    execution: Execution, sharding: Sharding | None = None,
):  # fmt: skip
    """The velocity where each choice (``groups.choice_schema``) begins, float32 (B, T, P)."""
    time_B1 = jnp.asarray(steps.start)[batch["step"]]
    x_BTP = batch["patches"]
    out_BTP = model.apply(params, x_BTP, time_B1, rows_of(model, batch), execution, sharding)
    return flow.velocity_of(model.prediction, out_BTP, x_BTP, time_B1[..., None])


def flow_grpo(
    params, model: VideoDiT, batch: Mapping[str, jax.Array], how: FlowGRPO, steps: Steps,
    execution: Execution, sharding: Sharding | None = None,
) -> LossOutput:  # fmt: skip
    """The loss of a batch of choices; ``batch["reference"]`` has the reference's velocities where
    ``how.kl`` asks for them.

    Metrics: as ``trainers.rl.objectives.policy_loss``, without what compares it with itself.
    """
    time_B11, end_B11, deviation_B11 = (jnp.asarray(a)[batch["step"]][..., None] for a in steps)
    deviation_B = deviation_B11[:, 0, 0]

    def mean(velocity_BTP):
        return step_mean(batch["patches"], velocity_BTP, time_B11, end_B11, deviation_B11)

    mean_BTP = mean(velocities(params, model, batch, steps, execution, sharding))
    logprob_B1 = log_density(batch["next"], mean_BTP, deviation_B)[:, None]
    chosen = {"mask": jnp.ones_like(logprob_B1), "logprobs": batch["logprob"]}
    taken = Trajectory.of(chosen | {"advantages": batch["advantage"]})
    out = policy_loss(how.algorithm, taken, logprob_B1)
    if not how.kl:
        return out
    kl = jnp.sum(divergence(mean_BTP, mean(batch[REFERENCE]), deviation_B))
    return replace(out, parts=out.parts | {"kl": Part(kl, out.parts["policy"].weight, how.kl)})
