"""Random batches of trajectories, and the same as a list of answers for the oracles.

Shape suffixes: B rows, T places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from step_jax.trainers.rl.trajectory import Trajectory
from tests.trainers.rl_oracles import Answer

B, T, GROUP = 8, 9, 4


def batch(seed=0, off_policy=0.4, mismatch=0.05) -> Trajectory:
    """Two groups of four answers, their rows mixed up: prompts, answers with a hole, padding.

    off_policy: how far the reference and old policies are away; mismatch: old from behaviour.
    """
    rng = np.random.default_rng(seed)
    start_B, length_B = rng.integers(1, 3, B), rng.integers(2, 6, B)
    place_T = np.arange(T)
    mask_BT = (place_T >= start_B[:, None]) & (place_T < (start_B + length_B)[:, None])
    mask_BT[:, 3] &= rng.random(B) < 0.6  # a tool's word in the middle of an answer
    mask_BT = mask_BT.astype(np.float32)
    behaviour_BT = -rng.exponential(0.7, (B, T))

    def near(spread):
        return np.minimum(behaviour_BT + spread * rng.standard_normal((B, T)), -1e-3)

    arrays = {
        "tokens_BT": rng.integers(0, 50, (B, T)),
        "targets_BT": rng.integers(0, 50, (B, T)),
        "mask_BT": mask_BT,
        "logprobs_BT": behaviour_BT * mask_BT,
        "rewards_BT": rng.standard_normal((B, T)) * mask_BT,
        "version_BT": np.zeros((B, T)),
        "lengths_B": start_B + length_B + 1,
        "finish_B": rng.integers(0, 3, B),
        "group_B": rng.permutation(np.arange(B) % 2 * 5),
        "old_BT": near(mismatch),
        "reference_BT": near(off_policy),
        "values_BT": rng.standard_normal((B, T)),
        "advantages_BT": rng.standard_normal((B, T)) * mask_BT,
    }
    whole = ("tokens_BT", "targets_BT", "version_BT", "lengths_B", "finish_B", "group_B")
    typed = {n: a.astype(np.int32 if n in whole else np.float32) for n, a in arrays.items()}
    return Trajectory(**typed)


def policy(t: Trajectory, seed=2, spread=0.3) -> np.ndarray:
    """Log-probs of a policy near the old one, float32 (B, T); nonsense where nothing was chosen."""
    noise_BT = spread * np.random.default_rng(seed).standard_normal(t.old_BT.shape)
    return np.minimum(t.old_BT + noise_BT, -1e-3).astype(np.float32)


def answers(t: Trajectory, policy_BT, fixed_BT=None, entropy_BT=None) -> list[Answer]:
    """The rows as the oracles see them, in float64; padding is left out."""
    fixed_BT = policy_BT if fixed_BT is None else fixed_BT
    entropy_BT = policy_BT if entropy_BT is None else entropy_BT
    found = []
    for b in range(len(t.mask_BT)):
        places = np.flatnonzero(t.mask_BT[b])
        if not len(places):
            continue

        def of(a_BT, b=b, places=places):
            return np.asarray(a_BT[b, places], np.float64).tolist()

        cut = t.finish_B[b] != 0
        found.append(
            Answer(
                policy=of(policy_BT),
                fixed=of(fixed_BT),
                old=of(t.old_BT),
                behaviour=of(t.logprobs_BT),
                reference=of(t.reference_BT),
                reward=of(t.rewards_BT),
                value=of(t.values_BT),
                entropy=of(entropy_BT),
                group=int(t.group_B[b]),
                after=float(t.values_BT[b, places[-1] + 1]) if cut else 0.0,
            )
        )
    return found


def at_places(t: Trajectory, rows: Sequence[Sequence[float]]) -> np.ndarray:
    """What the oracles say of each choice, back at its place."""
    found_BT, left = np.zeros(t.mask_BT.shape), list(rows)
    for b in range(len(found_BT)):
        places = np.flatnonzero(t.mask_BT[b])
        if len(places):
            found_BT[b, places] = left.pop(0)
    return found_BT


def padded(t: Trajectory, rows=3, places=4) -> Trajectory:
    """With rows and places more, full of what must not matter."""

    def more(name, a):
        if a is None:
            return None
        shape = (len(a) + rows, *(n + places for n in a.shape[1:]))
        zero = name in ("mask_BT", "logprobs_BT", "rewards_BT", "advantages_BT", "group_B")
        new = np.full(shape, 0 if zero else 3, a.dtype)
        new[tuple(slice(n) for n in a.shape)] = a
        if name == "finish_B":
            new[len(a) :] = 1
        return new

    names = [f.name for f in dataclasses.fields(t) if f.name != "routing_LBTK"]
    return dataclasses.replace(t, **{name: more(name, getattr(t, name)) for name in names})


def reordered(t: Trajectory, order) -> Trajectory:
    """The rows in another order, their groups under other names."""
    arrays = {f"{n}_BT" if a.ndim > 1 else f"{n}_B": a[order] for n, a in t.batch().items()}
    arrays["group_B"] = (arrays["group_B"] + 2) % len(order)
    return Trajectory(**arrays)
