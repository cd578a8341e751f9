"""The table of algorithms: what each paper takes of the signals, terms and reductions there are.

Adding one is adding an entry; a term that it needs and nobody has can stand in the same file.
"""

from __future__ import annotations

from collections.abc import Callable

from step_jax.core.errors import ConfigError
from step_jax.core.yaml_strict import did_you_mean
from step_jax.trainers.rl.objectives import (
    Algorithm,
    Clip,
    ClippedWeight,
    Constant,
    Critic,
    Filter,
    PolicyGradient,
    SequenceMean,
    TokenMean,
)
from step_jax.trainers.rl.signals import (
    GAE,
    KL,
    BatchNormalised,
    GroupRelative,
    LeaveOneOut,
    Overlong,
)

#: Step-3.5-Flash's: a token's ratio and the geometric mean of a text's (arXiv 2602.10604)
METROPOLIS = (Filter(0.5, 2.0), Filter(0.996, 1.001, "sequence"))

#: name -> the algorithm for answers of at most so many tokens
ALGORITHMS: dict[str, Callable[[int], Algorithm]] = {
    # as Open-Reasoner-Zero has it: arXiv 1707.06347, 2503.24290
    "ppo": lambda limit: Algorithm(GAE(), Clip(), TokenMean(), critic=Critic()),
    # arXiv 2402.03300
    "grpo": lambda limit: Algorithm(GroupRelative(), Clip(), SequenceMean(), kl=KL(0.04)),
    # arXiv 2503.20783
    "dr_grpo": lambda limit: Algorithm(GroupRelative(divide=False), Clip(), Constant(limit)),
    # arXiv 2503.14476: the last fifth of the limit is for the soft punishment, as there
    "dapo": lambda limit: Algorithm(
        GroupRelative(),
        Clip(0.2, 0.28),
        TokenMean(),
        overlong=Overlong(limit, max(1, limit // 5)),
        dynamic_sampling=True,
    ),
    # arXiv 2402.14740: an answer is one choice, whose log-probability is a sum; TRL's coefficient
    "rloo": lambda limit: Algorithm(
        LeaveOneOut(), PolicyGradient(), Constant(1), kl=KL(0.05, "k1", "reward")
    ),
    # arXiv 2501.03262; OpenRLHF's coefficient
    "reinforce_pp": lambda limit: Algorithm(
        BatchNormalised(), Clip(), TokenMean(), kl=KL(0.01, "k1", "reward")
    ),
    # arXiv 2507.18071
    "gspo": lambda limit: Algorithm(GroupRelative(), Clip(3e-4, 4e-4, "sequence"), SequenceMean()),
    # arXiv 2506.13585
    "cispo": lambda limit: Algorithm(GroupRelative(), ClippedWeight(), TokenMean()),
    # arXiv 2602.10604
    "mis_po": lambda limit: Algorithm(
        GAE(), PolicyGradient(), TokenMean(), METROPOLIS, critic=Critic()
    ),
}


def algorithm(name: str, limit: int) -> Algorithm:
    """The algorithm of the table, for answers of at most ``limit`` tokens.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in ALGORITHMS:
        hint = did_you_mean(name, ALGORITHMS)
        raise ConfigError(f"no algorithm {name!r}{hint}; there are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name](limit)
