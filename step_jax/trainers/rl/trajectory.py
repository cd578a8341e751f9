"""What a rollout left: the texts, what the policy wrote of them, how likely that was, its rewards.

One row is one text, padded on the right. Everything per token stands at the place whose *target*
the token is, as in a batch of packed text: place t has read tokens 0..t and chosen the token t + 1.
So ``values_BT`` at t is the value of the state in which that choice was made, and the state after a
row's last choice has the next place. A row without any choice is padding, and counts nowhere.

Shape suffixes: B rows, T places, P places of a prompt, N tokens of an answer, L layers, K experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import struct

from step_jax.core.errors import DataError
from step_jax.data.schema import Field, Schema
from step_jax.inference.generate import StopReason, Written

#: why a row ended, by its number in ``finish_B``; all but ``stop`` cut the text short
FINISH: tuple[str, ...] = get_args(StopReason)
#: what is added to a rollout before it is learned from
STREAMS = ("old", "reference", "values", "advantages", "returns")
ROUTING = "routing_"


@struct.dataclass
class Trajectory:
    """A batch of rollouts; arrays of the device, or of NumPy.

    Attributes:
      tokens_BT: int32, the text from its first token, padded with any token.
      targets_BT: int32, the token after each place.
      mask_BT: float32, 1 where the target was chosen by the policy, 0 where it was not (the prompt,
        a tool's reply, padding). The last place has no target.
      logprobs_BT: float32, log-probability of each choice when it was made (behaviour policy), as
        ``inference.sampling.sample`` defines it; 0 elsewhere.
      rewards_BT: float32, reward of each choice; that of a whole answer is its last choice's.
      version_BT: int32, the parameters' version that made each choice.
      lengths_B: int32, tokens of the text, prompt included.
      finish_B: int32, why the row ended: an index into ``FINISH``.
      group_B: int32 in 0..B-1, equal for the answers to one prompt.
      routing_LBTK: decisions of a mixture's routers, the leaves of ``trunk.routing_of``.
      old_BT: float32, log-probabilities of the choices before the update, by the trainer.
      reference_BT: float32, the same under a frozen reference policy.
      values_BT: float32, the critic's value of the state at each place.
      advantages_BT: float32, what each choice was better than expected, see ``signals``.
      returns_BT: float32, what the critic learns to predict.
    """

    tokens_BT: Any
    targets_BT: Any
    mask_BT: Any
    logprobs_BT: Any
    rewards_BT: Any
    version_BT: Any
    lengths_B: Any
    finish_B: Any
    group_B: Any
    routing_LBTK: tuple[Any, ...] = ()
    old_BT: Any = None
    reference_BT: Any = None
    values_BT: Any = None
    advantages_BT: Any = None
    returns_BT: Any = None

    @property
    def chosen_B(self):
        """How many tokens of each row the policy chose, float32."""
        return jnp.sum(self.mask_BT, axis=1, dtype=jnp.float32)

    @property
    def real_B(self):
        """float32, 0 for a row that is padding, else 1."""
        return (self.chosen_B > 0).astype(jnp.float32)

    @property
    def cut_B(self):
        """bool, whether the text was cut short instead of ending by itself."""
        return self.finish_B != FINISH.index("stop")

    @property
    def outcome_B(self):
        """The sum of each row's rewards, float32."""
        return jnp.sum(self.rewards_BT * self.mask_BT, axis=1, dtype=jnp.float32)

    def rewarded(self, rewards) -> Trajectory:
        """With the rewards of whole answers (B,), or of single choices (B, T), added to its own."""
        where_BT = self.mask_BT
        if rewards.ndim == 1:
            where_BT, rewards = last_place(where_BT), rewards[:, None]
        # not a product: a reward that is not finite must stay where it belongs, to be found there
        added_BT = jnp.where(where_BT > 0, rewards, 0.0)
        return dataclasses.replace(self, rewards_BT=self.rewards_BT + added_BT)

    def batch(self) -> dict[str, Any]:
        """The arrays by the names of :func:`schema`, for a train step."""
        arrays = {name: getattr(self, attribute) for name, attribute in _NAMES.items()}
        routing = {f"{ROUTING}{i}": a for i, a in enumerate(self.routing_LBTK)}
        return {name: a for name, a in arrays.items() if a is not None} | routing

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Trajectory:
        """The trajectory whose :meth:`batch` has these arrays; others are left out."""
        arrays = {attribute: batch.get(name) for name, attribute in _NAMES.items()}
        count = sum(name.startswith(ROUTING) for name in batch)
        return cls(**arrays, routing_LBTK=tuple(batch[f"{ROUTING}{i}"] for i in range(count)))


#: name in a batch -> attribute
_NAMES = {
    field.name.rpartition("_")[0]: field.name
    for field in dataclasses.fields(Trajectory)
    if field.name != "routing_LBTK"
}
_WHOLE = ("tokens", "targets", "version", "lengths", "finish", "group")


def schema(
    rows: int,
    places: int,
    streams: Sequence[str] = (),
    routing: Sequence[tuple[int, int]] = (),
) -> Schema:
    """What the batch of a trajectory is.

    Args:
      streams: which of ``STREAMS`` it has.
      routing: (layers, experts a token) of each array of routing decisions.
    """
    fields = {}
    for name, attribute in _NAMES.items():
        if name in STREAMS and name not in streams:
            continue
        axes, shape = ("batch", "sequence"), (rows, places)
        dims = len(attribute.rpartition("_")[2])
        dtype = "int32" if name in _WHOLE else "float32"
        fields[name] = Field(axes[:dims], shape[:dims], dtype)
    for i, (layers, experts) in enumerate(routing):
        fields[f"{ROUTING}{i}"] = Field(
            (None, "batch", "sequence", None), (layers, rows, places, experts), "int32"
        )
    return fields


def last_place(mask_BT):
    """float32 (B, T): 1 at the place of each row's last choice; nowhere in a row of padding."""
    later_BT = jnp.flip(jnp.cumsum(jnp.flip(mask_BT, 1), axis=1), 1)
    return mask_BT * (later_BT == 1)


def gathered(
    prompts_BP, lengths_B, written: Written, group_B, version=0, max_length: int | None = None
) -> Trajectory:
    """The trajectory of a rollout (``inference.generate.rollout``), without rewards. Pure.

    Args:
      prompts_BP: int32, padded on the right.
      lengths_B: int32 lengths of the prompts.
      written: what was written after them.
      group_B: int32, see :class:`Trajectory`.
      version: of the parameters that wrote.
      max_length: the context, if that is what ended the rows that reached it.

    Returns:
      T = P + N places. Rows whose prompt is empty are padding.
    """
    P, N = prompts_BP.shape[1], written.tokens_BN.shape[1]
    place_1T = jnp.arange(P + N, dtype=jnp.int32)[None]
    start_B1 = lengths_B[:, None]
    total_B = lengths_B + written.lengths_B

    def text(prompts_BP, written_BN):
        """What stands at each place of the text: of the prompt, then of the answer."""
        prompts_BT = jnp.pad(prompts_BP, ((0, 0), (0, N)))
        after_BT = jnp.clip(place_1T - start_B1, 0, N - 1)
        answer_BT = jnp.take_along_axis(written_BN, after_BT, axis=1)
        text_BT = jnp.where(place_1T < start_B1, prompts_BT, answer_BT)
        return jnp.where(place_1T < total_B[:, None], text_BT, 0)

    def ahead(a_BT):
        return jnp.pad(a_BT[:, 1:], ((0, 0), (0, 1)))

    tokens_BT = text(prompts_BP, written.tokens_BN)
    chosen_BT = (place_1T + 1 >= start_B1) & (place_1T + 1 < total_B[:, None]) & (start_B1 > 0)
    mask_BT = chosen_BT.astype(jnp.float32)
    full_B = False if max_length is None else total_B >= max_length
    cut_B = jnp.where(full_B, FINISH.index("context"), FINISH.index("length"))
    return Trajectory(
        tokens_BT=tokens_BT,
        targets_BT=ahead(tokens_BT),
        mask_BT=mask_BT,
        logprobs_BT=mask_BT * ahead(text(jnp.zeros(prompts_BP.shape), written.logprobs_BN)),
        rewards_BT=jnp.zeros(mask_BT.shape, jnp.float32),
        version_BT=jnp.full(mask_BT.shape, version, jnp.int32),
        lengths_B=total_B,
        finish_B=jnp.where(written.stopped_B, FINISH.index("stop"), cut_B).astype(jnp.int32),
        group_B=group_B,
    )


def check(t: Trajectory, needs: Sequence[str] = (), smallest_group: int = 1) -> None:
    """Looks at a trajectory on the host before it is learned from.

    Args:
      needs: which of ``STREAMS`` an algorithm reads.
      smallest_group: how many answers it compares at least.

    Raises:
      DataError: arrays that are missing or do not fit together; a reward, log-probability or stream
        that is not finite, a log-probability above 0; a mask that is not 0 and 1, or marks a place
        without a target; a group or finish reason that does not exist; a group that is too small.
        It names the row, its group, the place and what was found.
    """
    found = {name: np.asarray(a) for name, a in t.batch().items()}
    _check_shapes(t, found, needs)
    mask_BT, group_B = found["mask"], found["group"]
    B, T = mask_BT.shape

    def refuse(bad, message: str, a=None):
        if not bad.any():
            return
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        place = f", place {at[1]}" if len(at) > 1 else ""
        value = "" if a is None else f" {a[at]}"
        raise DataError(
            f"rollout: row {at[0]} (group {int(group_B[at[0]])}){place}: {message}{value}; "
            f"{int(bad.sum())} such in {B} rows"
        )

    refuse((mask_BT != 0) & (mask_BT != 1), "the mask must be 0 or 1, not", mask_BT)
    refuse((mask_BT != 0) & (np.arange(T) == T - 1), "the last place has no target to choose")
    refuse((group_B < 0) | (group_B >= B), f"groups are numbered from 0 to {B - 1}, not", group_B)
    finish_B = found["finish"]
    reasons = ", ".join(f"{i} {name}" for i, name in enumerate(FINISH))
    unknown_B = (finish_B < 0) | (finish_B >= len(FINISH))
    refuse(unknown_B, f"the finish reasons are {reasons}, not", finish_B)
    chosen_BT = mask_BT != 0
    for name in ("rewards", "logprobs", *(s for s in STREAMS if s in found)):
        a = found[name]
        # a critic is asked for the state after the last choice, too
        where_BT = np.ones_like(chosen_BT) if name == "values" else chosen_BT
        refuse(where_BT & ~np.isfinite(a), f"{name} is not finite:", a)
    refuse(~chosen_BT & (found["rewards"] != 0), "a reward where nothing was chosen:",
           found["rewards"])  # fmt: skip
    refuse(chosen_BT & (found["logprobs"] > 0), "a log-probability above 0:", found["logprobs"])
    real_B = chosen_BT.any(axis=1)
    size_B = np.bincount(group_B[real_B], minlength=B)[group_B]
    refuse(
        real_B & (size_B < smallest_group),
        f"its answers are compared with each other: a group needs {smallest_group}, this one has",
        size_B,
    )


def _check_shapes(t: Trajectory, found: Mapping[str, np.ndarray], needs: Sequence[str]) -> None:
    if missing := [name for name in needs if name not in found]:
        raise DataError(f"rollout: the algorithm reads {', '.join(missing)}, which is not there")
    if found["tokens"].ndim != 2:
        raise DataError(f"rollout: tokens have shape {found['tokens'].shape}, expected (rows, T)")
    rows, places = found["tokens"].shape
    routing = [(a.shape[0], a.shape[-1]) for a in t.routing_LBTK]
    expected = schema(rows, places, [name for name in STREAMS if name in found], routing)
    wrong = [
        f"{name} has shape {found[name].shape}, expected {field.shape}"
        for name, field in expected.items()
        if found[name].shape != field.shape
    ]
    if wrong:
        raise DataError(f"rollout: {'; '.join(wrong)}, as the tokens have")
