"""Advantages and RL losses transcribed from their papers, in float64 NumPy, answer by answer.

Written from the equations, not from step_jax, with loops over answers and tokens, no masks inside a
formula, no batching. Nothing here may import step_jax.

An answer is a list of choices in the order they were made. Given of it are each choice's log-prob
under four policies, its reward and value, and ``after``: the value of the state after the last one
(0 if the text ended by itself). What a formula holds fixed (stop-gradient) is read of ``fixed``, a
copy of the policy's log-probs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EPSILON = 1e-4


@dataclass
class Answer:
    """One answer; every list has an entry per choice."""

    policy: list[float]
    fixed: list[float]
    old: list[float]
    behaviour: list[float]
    reference: list[float]
    reward: list[float]
    value: list[float]
    entropy: list[float]
    group: int
    after: float

    @property
    def length(self) -> int:
        return len(self.policy)

    @property
    def outcome(self) -> float:
        return sum(self.reward)


def others(answers: list[Answer], one: Answer) -> list[float]:
    return [a.outcome for a in answers if a.group == one.group and a is not one]


def peers(answers: list[Answer], one: Answer) -> list[float]:
    return [*others(answers, one), one.outcome]


def group_relative(answers: list[Answer], divide: bool) -> list[list[float]]:
    found = []
    for a in answers:
        outcomes = peers(answers, a)
        advantage = a.outcome - np.mean(outcomes)
        if divide:
            advantage = advantage / (np.std(outcomes, ddof=1) + EPSILON)
        found.append([advantage] * a.length)
    return found


def leave_one_out(answers: list[Answer]) -> list[list[float]]:
    return [[a.outcome - np.mean(others(answers, a))] * a.length for a in answers]


def whitened(advantages: list[list[float]]) -> list[list[float]]:
    every = [x for row in advantages for x in row]
    mean, deviation = np.mean(every), np.std(every)
    return [[(x - mean) / (deviation + EPSILON) for x in row] for row in advantages]


def batch_normalised(answers: list[Answer], baseline: bool) -> list[list[float]]:
    found = []
    for a in answers:
        less = np.mean(peers(answers, a)) if baseline else 0.0
        found.append([sum(a.reward[t:]) - less for t in range(a.length)])
    return whitened(found)


def gae(answers: list[Answer], gamma: float, lam: float):
    """(advantages, returns) by the double sum of arXiv 1506.02438, eq. 16."""
    advantages = []
    for a in answers:
        following = [*a.value[1:], a.after]
        delta = [r + gamma * v2 - v for r, v, v2 in zip(a.reward, a.value, following, strict=True)]
        n = a.length
        advantages.append(
            [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        )
    returns = [
        [x + v for x, v in zip(row, a.value, strict=True)]
        for row, a in zip(advantages, answers, strict=True)
    ]
    return advantages, returns


def overlong(length: int, limit: int, buffer: int) -> float:
    """arXiv 2503.14476, eq. 13."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


# --- Losses of one token ------------------------------------------------------------------------


def clip(x, low, high):
    return min(max(x, low), high)


def ppo(ratio, advantage, low, high):
    return -min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def dual_clip(ratio, advantage, low, high, c):
    gain = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
    return -(max(gain, c * advantage) if advantage < 0 else gain)


def geometric(a: list[float], b: list[float]) -> float:
    """(prod exp(a) / exp(b)) ^ (1 / n)."""
    return math.prod(math.exp(x - y) for x, y in zip(a, b, strict=True)) ** (1 / len(a))


def k1(logp, reference):
    return logp - reference


def k2(logp, reference):
    return (logp - reference) ** 2 / 2


def k3(logp, reference):
    return math.exp(reference - logp) - (reference - logp) - 1


# --- Reductions of tokens' losses ---------------------------------------------------------------


def token_mean(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / sum(map(len, losses))


def sequence_mean(losses: list[list[float]]) -> float:
    return float(np.mean([np.mean(row) for row in losses]))


def constant(losses: list[list[float]], length: int) -> float:
    return float(np.mean([sum(row) / length for row in losses]))


# --- Algorithms, their names as in the table ----------------------------------------------------


def tokens(answers, advantages, loss):
    """``loss(answer, t, advantage)`` of every token."""
    return [
        [loss(a, t, row[t]) for t in range(a.length)]
        for a, row in zip(answers, advantages, strict=True)
    ]


def ratio(a: Answer, t: int) -> float:
    return math.exp(a.policy[t] - a.old[t])


def clipped(low, high):
    return lambda a, t, advantage: ppo(ratio(a, t), advantage, low, high)


def gspo(a, t, advantage):
    return ppo(geometric(a.policy, a.old), advantage, 3e-4, 4e-4)


def cispo(cap):
    def loss(a, t, advantage):
        weight = min(math.exp(a.fixed[t] - a.old[t]), cap)
        return -weight * advantage * a.policy[t]

    return loss


def mis_po(a, t, advantage):
    taken = 0.5 <= math.exp(a.old[t] - a.behaviour[t]) <= 2.0
    taken &= 0.996 <= geometric(a.old, a.behaviour) <= 1.001
    return -float(taken) * a.policy[t] * advantage


def losses(answers, advantages, limit: int) -> dict[str, float]:
    """The policy's loss of every algorithm, from given advantages."""

    def of(loss):
        return tokens(answers, advantages, loss)

    divergence = [[k3(p, q) for p, q in zip(a.policy, a.reference, strict=True)] for a in answers]
    return {
        "ppo": token_mean(of(clipped(0.2, 0.2))),
        "grpo": sequence_mean(of(clipped(0.2, 0.2))) + 0.04 * sequence_mean(divergence),
        "dr_grpo": constant(of(clipped(0.2, 0.2)), limit),
        "dapo": token_mean(of(clipped(0.2, 0.28))),
        "rloo": constant(of(lambda a, t, advantage: -advantage * a.policy[t]), 1),
        "reinforce_pp": token_mean(of(clipped(0.2, 0.2))),
        "gspo": sequence_mean(of(gspo)),
        "cispo": token_mean(of(cispo(5.0))),
        "mis_po": token_mean(of(mis_po)),
    }
