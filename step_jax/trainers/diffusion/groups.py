"""Groups of clips that a policy draws of one caption, and the chosen steps by which it drew them.

Shape suffixes: M clips of a round, R choices of a round, B choices of a batch, G captions of a
round, K clips of a caption, S chosen steps of a clip, T tokens, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import TextBank, text_fields
from step_jax.data.clips import Reads, Shape, clip_schema
from step_jax.data.packing import derive_key, permutation
from step_jax.data.rendered import RenderedClips
from step_jax.data.schema import Field, Schema
from step_jax.inference.flow import draw_paths, known_scalars
from step_jax.models.context import Execution
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow_policy import Choices
from step_jax.models.video.patches import places_of
from step_jax.trainers.diffusion.asked import AskedData, Asking
from step_jax.trainers.rl.objectives import Algorithm
from step_jax.trainers.rl.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class GroupData(AskedData):
    """Clips that the policy draws by captions of scenes, some steps by chance.

    groups: captions that a round asks for; the rounds go through all captions in turn.
    choices: the steps that are drawn by chance, and learnt from.
    """

    kind: ClassVar[str] = "groups"
    groups: int = 16
    choices: Choices = Choices()

    def validate(self):
        super().validate()
        checks.at_least(self, groups=1)
        self.choices.within(self.sampler.steps)
        if (self.sampler.method, self.sampler.guidance) != ("euler", 1.0):
            raise ConfigError(
                "the steps of data.sampler are the policy's choices: they are by euler and of "
                "guidance 1. A student that was taught by a guided model needs no guidance (data: "
                "{kind: reflow} of step-jax diffusion)"
            )

    @property
    def chosen(self) -> int:
        """Steps of a clip that are learnt from."""
        first, end = self.choices.within(self.sampler.steps)
        return end - first


class Round(NamedTuple):
    """What a policy drew, NumPy arrays; a checkpoint carries them.

    Attributes:
      states_MSTP: where the chosen steps begin, and where the last of them ends: float32
        (M, S + 1, T, P).
      logprobs_MS: of each, float32.
      advantages_M: float32.
      texts_M: which text of the bank was asked for, int32.
    """

    states_MSTP: np.ndarray
    logprobs_MS: np.ndarray
    advantages_M: np.ndarray
    texts_M: np.ndarray


def choice_schema(
    shape: Shape, numbers: int, reads: Reads, texts: Mapping[str, tuple[int, ...]]
) -> Schema:
    """The arrays of a batch of choices, a row for each: ``patches`` as the step begins, ``next`` as
    it ends, ``step`` its number among all of the sampler, ``logprob`` and ``advantage``."""
    clips = dict(clip_schema(shape, numbers, reads, text_fields(texts)))
    del clips["samples"]  # nothing of a choice is drawn anew
    of_row = ("batch", None), (shape.rows, 1)
    return {
        **clips,
        "next": clips["patches"],
        "step": Field(*of_row, "int32"),
        "logprob": Field(*of_row),
        "advantage": Field(*of_row),
    }


class GroupMaker:
    """Draws rounds of groups, and makes batches of them."""

    def __init__(
        self,
        data: GroupData,
        source: RenderedClips,
        model: VideoDiT,
        bank: TextBank,
        execution: Execution,
        sharding: Sharding,
        report: Callable[[str], None],
    ):
        """
        Raises:
          ConfigError: a model that does not draw what ``data`` says.
        """
        self._data, self._model, self._bank = data, model, bank
        self._execution, self._sharding, self._report = execution, sharding, report
        self._asking = Asking(data, source, model, bank, sharding)
        self._scalars = known_scalars(model, data.buckets[0])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must agree with."""
        return self._asking.made | {"refresh_every": self._data.refresh_every}

    def drawn(self, params: Any, step: int, algorithm: Algorithm) -> tuple[Round, dict[str, float]]:
        """Has the policy draw the round that begins with a step; also its figures."""
        data, number = self._data, self._data.round(step)
        numbers = number * data.groups + np.arange(data.groups)
        which_M = self._asking.which(self._asking.texts(numbers))
        paths = draw_paths(
            params,
            self._model,
            self._bank.encoded,
            which_M,
            data.buckets[0],
            data.sampler,
            data.choices,
            seed=data.seed,
            number=number * len(which_M),
            execution=self._execution,
            sharding=self._sharding,
        )
        groups = np.split(paths.clips_NFHWC, data.groups)
        rewards_GK = np.array([
            self._asking.rewards(int(n), clips) for n, clips in zip(numbers, groups, strict=True)
        ])  # fmt: skip
        advantages_M = advantages(rewards_GK, algorithm).ravel()
        telling = float(np.ptp(rewards_GK, axis=1).astype(bool).mean())
        figures = {"reward": float(rewards_GK.mean()), "telling": telling}
        if not telling:
            self._report(
                f"all clips of a caption that the policy of step {step} drew are alike in "
                f"{', '.join(data.reward)}: there is nothing to learn of them"
            )
        round = Round(
            paths.states_NSTP,
            paths.logprobs_NS,
            advantages_M.astype(np.float32),
            which_M.astype(np.int32),
        )
        return round, figures

    def batch(
        self, round: Round, rows: int, step: int, index: int = 0, count: int = 1
    ) -> dict[str, np.ndarray]:
        """Part ``index`` of ``count`` of a step's ``rows`` choices.

        They are those of clips that are better or worse than the others of their group, if there
        are any, in an order of their round: all of them once, then all again.
        """
        data, S = self._data, self._data.chosen
        telling = np.flatnonzero(round.advantages_M)
        clips = telling if len(telling) else np.arange(len(round.advantages_M))
        R = len(clips) * S
        before = (step - data.round(step) * (data.refresh_every or 0)) * rows
        at_B = before + np.arange(rows // count * index, rows // count * (index + 1))
        epoch_B, place_B = np.divmod(at_B, R)
        order = {e: permutation(R, derive_key(data.seed, data.round(step), e)) for e in {*epoch_B}}
        chosen_B = np.array([order[e][p] for e, p in zip(epoch_B, place_B, strict=True)])
        clip_B, which_B = clips[chosen_B // S], chosen_B % S
        first, _ = data.choices.within(data.sampler.steps)
        text_B, B = round.texts_M[clip_B], len(clip_B)
        place_TA = places_of(data.buckets[0], self._model.patch)
        out = {
            "patches": round.states_MSTP[clip_B, which_B],
            "next": round.states_MSTP[clip_B, which_B + 1],
            "places": np.broadcast_to(place_TA, (B, *place_TA.shape)),
            "step": (first + which_B).astype(np.int32)[:, None],
            "logprob": round.logprobs_MS[clip_B, which_B][:, None],
            "advantage": round.advantages_M[clip_B][:, None],
        }
        for name, texts in self._bank.encoded.items():
            out[f"text/{name}"] = texts.values[text_B][:, None]
            out[f"lengths/{name}"] = texts.lengths_K[text_B][:, None]
        if self._model.scalars:
            out["scalars"] = np.tile(self._scalars, (B, 1, 1))
        return out


def advantages(rewards_GK: np.ndarray, algorithm: Algorithm) -> np.ndarray:
    """What each clip is better than the others of its caption, float32 (G, K)."""
    G, K = rewards_GK.shape
    of_clips = {
        "mask": np.ones((G * K, 1), np.float32),
        "rewards": rewards_GK.reshape(-1, 1).astype(np.float32),
        "group": np.repeat(np.arange(G, dtype=np.int32), K),
    }
    return np.asarray(algorithm.judged(Trajectory.of(of_clips)).advantages_BT).reshape(G, K)
