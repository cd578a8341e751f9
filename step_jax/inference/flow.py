"""Sampling from flow-matching models: the ways through time, and guidance by a text.

All of them integrate dx/dt = v(x, t) from noise at t = 0 to data at t = 1 (``models.video.flow``).

Shape suffixes: N samples, T tokens, P numbers in a patch, S steps, F frames, H height, W width, C
channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Artifact
from step_jax.core import checks, rng
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import Encoded
from step_jax.models.context import Execution
from step_jax.models.video import flow
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.flow_policy import Choices, log_density, step_mean
from step_jax.models.video.patches import Sizes, clip_of, grid, patches_of, places_of

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
ROWS = 64  # clips that are drawn at once where there are many


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    method: ``euler``; ``heun`` (second order, two evaluations a step); ``dpm`` (DPM-Solver++ 2M,
      arXiv 2211.01095) and ``unipc`` (arXiv 2302.04867), second order with one evaluation a step.
    steps: from noise to data.
    shift: moves the steps towards the noise (Step-Video: 13, distilled 17).
    guidance: scale of what the text changes, ``v(no text) + scale (v(text) - v(no text))``; 1 shows
      the model the text alone.
    decay: the scale falls with time, ``max(guidance - decay t (guidance - 1), 1)``; Step-Video's
      distilled model has 9.
    interval: times outside of which nothing is guided (arXiv 2404.07724).
    """

    method: Literal["euler", "heun", "dpm", "unipc"] = "euler"
    steps: int = 50
    shift: float = 1.0
    guidance: float = 1.0
    decay: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def validate(self):
        checks.at_least(self, steps=1, guidance=0, decay=0)
        checks.above(self, shift=0)
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ConfigError(
                f"the interval of guidance is {self.interval}; use 0 <= from < to <= 1"
            )

    @property
    def times(self) -> np.ndarray:
        """From 0 to 1, float32 (steps + 1,)."""
        return flow.schedule(self.steps, self.shift)

    def scale(self, time):
        """The scale of guidance at a time."""
        scale = jnp.asarray(self.guidance, jnp.float32)
        if self.decay:
            scale = jnp.maximum(scale - self.decay * time * (scale - 1), 1.0)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        return jnp.where(inside, scale, 1.0)

    def integrate(self, velocity: Velocity, x):
        """From noise ``x`` to data.

        Args:
          velocity: (x, float32 scalar time) -> what x has, of x's shape.
        """
        if self.method == "euler":
            return euler(velocity, x, self.times)
        if self.method == "heun":
            return heun(velocity, x, self.times)
        return multistep(velocity, x, self.times, correct=self.method == "unipc")


def euler(velocity: Velocity, x, times):
    """One evaluation a step, of first order."""

    def step(x, pair):
        t, end = pair
        return x + (end - t) * velocity(x, t), None

    return jax.lax.scan(step, x, (jnp.asarray(times[:-1]), jnp.asarray(times[1:])))[0]


def heun(velocity: Velocity, x, times):
    """The mean of the velocities at both ends of a step; the last step, at whose end there is no
    noise, is Euler's."""

    def step(x, pair):
        t, end = pair
        first = velocity(x, t)
        second = velocity(x + (end - t) * first, end)
        return x + 0.5 * (end - t) * (first + second), None

    x, _ = jax.lax.scan(step, x, (jnp.asarray(times[:-2]), jnp.asarray(times[1:-1])))
    return euler(velocity, x, times[-2:])


def multistep(velocity: Velocity, x, times, correct: bool):
    """Steps that extrapolate the predicted data from the step before, exact in the linear part.

    With the data ``d = x + (1 - t) v``, amplitude t and noise 1 - t, a step in ``log(t / (1 - t))``
    is ``a x + b d + c d_before``. ``correct``: once the data at the end of a step are known, it is
    taken again with them (UniC-2), which needs no evaluation of its own.
    """
    predict, again = coefficients(times)

    def step(carry, row):
        x, start, data, before = carry
        t, predict, again = row
        new = x + (1 - t) * velocity(x, t)
        if correct:
            x = again[0] * start + again[1] * data + again[2] * before + again[3] * new
        end = predict[0] * x + predict[1] * new + predict[2] * data
        return (end, x, new, data), None

    zero = jnp.zeros_like(x)
    rows = jnp.asarray(times[:-1]), jnp.asarray(predict), jnp.asarray(again)
    return jax.lax.scan(step, (x, x, zero, zero), rows)[0][0]


def coefficients(times) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`multistep` multiplies by, float32.

    Returns:
      - (steps, 3): of a step's start, its data and the data before, to predict its end;
      - (steps, 4): of the start of the step before, its data, the data before those and the new
        data, to correct where this step starts. The first corrects nothing.
    """
    t = np.asarray(times, np.float64)
    with np.errstate(divide="ignore"):
        place = np.log(t) - np.log1p(-t)
    n = len(t) - 1
    predict, again = np.zeros((n, 3)), np.zeros((n, 4))
    again[0, 0] = 1.0
    for i in range(n):
        h, keep = place[i + 1] - place[i], (1 - t[i + 1]) / (1 - t[i])
        full = -t[i + 1] * np.expm1(-h)  # of the data, if they do not change
        predict[i] = keep, full, 0.0
        finite = 0 < i < n - 1 and np.isfinite(place[i - 1])
        if finite:
            ratio = (place[i] - place[i - 1]) / h
            predict[i] = keep, full * (1 + 0.5 / ratio), -full * 0.5 / ratio
        if i + 1 < n:
            again[i + 1] = _corrected(
                keep, full, h, (place[i - 1] - place[i]) / h if finite else None
            )
    return predict.astype(np.float32), again.astype(np.float32)


def _corrected(keep: float, full: float, h: float, back: float | None) -> tuple[float, ...]:
    """Of (start, data, data before, data at the end): UniC of arXiv 2302.04867, B(h) = e^h - 1.

    ``back``: how far behind the start the data before are, in steps; None without any.
    """
    if not np.isfinite(h):  # from pure noise: the data at the start alone count
        return keep, full, 0.0, 0.0
    z = -h
    first = np.expm1(z) / z - 1
    b1 = first / np.expm1(z)
    if back is None:
        return keep, full * 0.5, 0.0, full * 0.5
    b2 = (first / z - 0.5) * 2 / np.expm1(z)
    end = (b2 - back * b1) / (1 - back)
    behind = (b1 - end) / back  # of (data before - data), per unit of its distance
    return keep, full * (1 - behind - end), full * behind, full * end


def guided(conditional, unconditional, scale):
    """``u + scale (c - u)``; the second is not computed where the scale is 1.

    Args:
      conditional, unconditional: functions of nothing to velocities.
    """

    def both(_):
        without = unconditional()
        return without + scale * (conditional() - without)

    return jax.lax.cond(scale == 1.0, lambda _: conditional(), both, None)


def check_guidance(artifact: Artifact, sampler: Sampler) -> None:
    """Raises CheckpointError if a model shall be guided that never learnt without text."""
    if sampler.guidance != 1 and not artifact.meta["guidable"]:
        raise CheckpointError(
            f"{artifact.name} was never trained without text (text.dropout was 0), so there is "
            "nothing to guide away from: use --sampler.guidance 1"
        )


Texts = Mapping[str, tuple[np.ndarray, np.ndarray]]


def draw(
    params,
    model: VideoDiT,
    texts: Texts,
    nothing: Texts,
    size: Sizes,
    sampler: Sampler,
    *,
    seed: int,
    execution: Execution,
    sharding: Sharding,
    count: int,
    number: int = 0,
    scalars: Mapping[str, float] | None = None,
    first_NHWC: np.ndarray | None = None,
) -> np.ndarray:
    """Latents, float32 (N, F, H, W, C), whole on every process.

    Sample n begins as noise ``number + n`` of ``seed``, however many are drawn with it.

    Args:
      texts: input -> (values (N, S) or (N, S, E), lengths (N,)), as ``data.captions.Encoded``.
      nothing: the same of the negative prompt, or of no text.
      size: of the latents.
      count: N.
      scalars: the model's extra conditions that the size does not say.
      first_NHWC: latents of the first frames, for a model that continues pictures.

    Raises:
      ConfigError: a size that the patches do not divide, or conditions that the model asks for.
    """
    rows = _rows(count, sharding)
    arguments = _told(model, (texts, nothing), size, count, rows, scalars, first_NHWC)
    compiled = _compiled(model, size, sampler, rows, execution, sharding)
    latents_NTP = np.asarray(compiled(params, jax.random.key(seed), number, *arguments))[:count]
    return model.deviation * np.asarray(clip_of(latents_NTP, size, model.patch))


def _rows(count: int, sharding: Sharding) -> int:
    """So many rows that every device has as many."""
    return count + -count % sharding.ways("batch")


def known_scalars(
    model: VideoDiT, size: Sizes, more: Mapping[str, float] | None = None
) -> np.ndarray:
    """The model's extra conditions of clips of one size, float32, in the order of ``scalars``.

    Raises:
      ConfigError: the model reads one that neither the size nor ``more`` says.
    """
    known = dict(zip(("frames", "height", "width"), size, strict=True)) | dict(more or {})
    if missing := [name for name in model.scalars if name not in known]:
        raise ConfigError(f"the model reads {', '.join(missing)} of a clip: say what they shall be")
    return np.array([known[name] for name in model.scalars], np.float32)


def _told(
    model: VideoDiT,
    texts: tuple[Texts, Texts],
    size: Sizes,
    count: int,
    rows: int,
    scalars: Mapping[str, float] | None = None,
    first_NHWC: np.ndarray | None = None,
) -> tuple[Any, ...]:
    """(texts, no texts, first, scalars) of so many clips, padded to ``rows``; see :func:`draw`."""
    grid(size, model.patch)
    own = known_scalars(model, size, scalars)
    if model.first_frame != (first_NHWC is not None):
        raise ConfigError(
            "the model continues a picture: give one" if model.first_frame
            else "the model does not continue pictures: it was trained from texts alone"
        )  # fmt: skip

    def padded(a):
        return np.pad(a, ((0, rows - count), *((0, 0),) * (a.ndim - 1)))

    first = None
    if first_NHWC is not None:
        first = np.zeros((count, *size, model.channels), np.float32)
        first[:, 0] = first_NHWC / model.deviation
        first = padded(np.asarray(patches_of(first, model.patch)))
    return (
        *(jax.tree.map(padded, dict(given)) for given in texts),
        first,
        np.tile(own, (rows, 1, 1)) if model.scalars else None,
    )


def draw_each(
    params,
    model: VideoDiT,
    texts: Mapping[str, Encoded],
    which_N: np.ndarray,
    size: Sizes,
    sampler: Sampler,
    *,
    seed: int,
    execution: Execution,
    sharding: Sharding,
    number: int = 0,
) -> Iterator[np.ndarray]:
    """Clips one after the other, float32 (F, H, W, C), of which ``ROWS`` at a time are drawn.

    Args:
      texts: of each input; the first is no text.
      which_N: the text of each clip.
    """
    for low, count, with_text, without in _in_turn(texts, which_N):
        clips_NFHWC = draw(
            params,
            model,
            with_text,
            without,
            size,
            sampler,
            seed=seed,
            number=number + low,
            execution=execution,
            sharding=sharding,
            count=min(ROWS, len(which_N)),
        )
        yield from clips_NFHWC[:count]


def _in_turn(
    texts: Mapping[str, Encoded], which_N: np.ndarray
) -> Iterator[tuple[int, int, Texts, Texts]]:
    """(first clip, how many are new, their texts, no texts) of draws that all are one program."""
    rows = min(ROWS, len(which_N))

    def of(chosen):
        return {name: (e.values[chosen], e.lengths_K[chosen]) for name, e in texts.items()}

    for low in range(0, len(which_N), rows):
        here = which_N[low : low + rows]
        yield low, len(here), of(np.resize(here, rows)), of(np.zeros(rows, int))


class Paths(NamedTuple):
    """Clips with the chosen steps by which they came about (``models.video.flow_policy``).

    Attributes:
      clips_NFHWC: latents, float32.
      states_NSTP: where the chosen steps begin, and last where the last of them ends, float32
        (N, S + 1, T, P).
      logprobs_NS: of each step, as ``log_density``, float32.
    """

    clips_NFHWC: np.ndarray
    states_NSTP: np.ndarray
    logprobs_NS: np.ndarray


def draw_paths(
    params,
    model: VideoDiT,
    texts: Mapping[str, Encoded],
    which_N: np.ndarray,
    size: Sizes,
    sampler: Sampler,
    choices: Choices,
    *,
    seed: int,
    execution: Execution,
    sharding: Sharding,
    number: int = 0,
) -> Paths:
    """As :func:`draw_each`, of steps by Euler of which some are chosen; all clips at once.

    The noise of a step is of ``seed``, the clip's number, the step's and the patch's place alone.
    """
    parts = []
    for low, count, with_text, without in _in_turn(texts, which_N):
        asked = min(ROWS, len(which_N))
        rows = _rows(asked, sharding)
        arguments = _told(model, (with_text, without), size, asked, rows)
        compiled = _compiled_paths(model, size, sampler, choices, rows, execution, sharding)
        made = compiled(params, jax.random.key(seed), number + low, *arguments)
        parts.append([np.asarray(a)[:count] for a in made])
    latents_NTP, states_NSTP, logprobs_NS = (np.concatenate(a) for a in zip(*parts, strict=True))
    clips_NFHWC = model.deviation * np.asarray(clip_of(latents_NTP, size, model.patch))
    return Paths(clips_NFHWC, states_NSTP, logprobs_NS)


@functools.lru_cache(maxsize=8)
def _compiled(
    model: VideoDiT,
    size: Sizes,
    sampler: Sampler,
    rows: int,
    execution: Execution,
    sharding: Sharding,
) -> Any:
    """(params, key, number, texts, no texts, first, scalars) -> latents in patches: one program
    for all draws of a kind."""

    def latents(params, key, number, *told):
        drawing = _Drawing(model, size, sampler, rows, execution, sharding)
        return sampler.integrate(drawing.velocity(params, *told), drawing.noise(key, number))

    return jax.jit(latents, out_shardings=sharding.replicated())


@functools.lru_cache(maxsize=8)
def _compiled_paths(
    model: VideoDiT,
    size: Sizes,
    sampler: Sampler,
    choices: Choices,
    rows: int,
    execution: Execution,
    sharding: Sharding,
) -> Any:
    """As :func:`_compiled` -> (latents in patches, states_NSTP, logprobs_NS)."""
    times = sampler.times
    deviation_S = choices.deviations(times)
    first, end = choices.within(sampler.steps)

    def paths(params, key, number, *told):
        drawing = _Drawing(model, size, sampler, rows, execution, sharding)
        velocity = drawing.velocity(params, *told)

        def step(x_NTP, row):
            i, t, end, deviation = row
            mean_NTP = step_mean(x_NTP, velocity(x_NTP, t), t, end, deviation)
            drawn_NTP = drawing.noise(rng.fold(key, i, "choice"), number)
            end_NTP = mean_NTP + deviation * drawn_NTP
            deviation_N = jnp.full(rows, jnp.where(deviation > 0, deviation, 1.0))
            return end_NTP, (x_NTP, log_density(end_NTP, mean_NTP, deviation_N))

        steps = (jnp.arange(sampler.steps), times[:-1], times[1:], deviation_S)
        start_NTP = drawing.noise(key, number)
        x_NTP, (states_SNTP, logprobs_SN) = jax.lax.scan(step, start_NTP, steps)
        states_SNTP = jnp.concatenate([states_SNTP, x_NTP[None]])[first : end + 1]
        return x_NTP, states_SNTP.swapaxes(0, 1), logprobs_SN[first:end].swapaxes(0, 1)

    return jax.jit(paths, out_shardings=sharding.replicated())


@dataclass(frozen=True)
class _Drawing:
    """Noise and velocity of rows of one size, within a program."""

    model: VideoDiT
    size: Sizes
    sampler: Sampler
    rows: int
    execution: Execution
    sharding: Sharding

    @property
    def place_NTA(self):
        place_TA = places_of(self.size, self.model.patch)
        return jnp.broadcast_to(place_TA, (self.rows, *place_TA.shape))

    def noise(self, key, number):
        """Of the samples from ``number`` on, float32 (N, T, P)."""
        sample_N1 = jnp.arange(self.rows, dtype=jnp.uint32)[:, None] + jnp.uint32(number)
        sample_NT = jnp.broadcast_to(sample_N1, self.place_NTA.shape[:2])
        return flow.noise(key, sample_NT, self.place_NTA, self.model.numbers)

    def velocity(self, params, texts, nothing, first_NTP, scalars_N1K) -> Velocity:
        """As the sampler's guidance has it."""
        model, sharding = self.model, self.sharding
        with_text = rows_with(model, self.place_NTA, texts, scalars_N1K, first_NTP)
        without = rows_with(model, self.place_NTA, nothing, scalars_N1K, first_NTP)

        def velocity(x_NTP, time):
            x_NTP = sharding.constrain(x_NTP, "batch", "sequence", None)

            def of(told: Rows):
                time_N1 = jnp.full((self.rows, 1), time)
                out_NTP = model.apply(params, x_NTP, time_N1, told, self.execution, sharding)
                return flow.velocity_of(model.prediction, out_NTP, x_NTP, time)

            if self.sampler.guidance == 1.0:
                return of(with_text)
            scale = self.sampler.scale(time)
            return guided(lambda: of(with_text), lambda: of(without), scale)

        return velocity


def rows_with(model: VideoDiT, place_NTA, texts, scalars_N1K, first_NTP) -> Rows:
    """Rows of one whole sample each, with these texts."""
    told = Rows(place_NTA, scalars_BGK=scalars_N1K, first_BTP=first_NTP)
    return replace(
        told,
        text=tuple(texts[t.name][0][:, None] for t in model.text),
        lengths=tuple(texts[t.name][1][:, None] for t in model.text),
    )
