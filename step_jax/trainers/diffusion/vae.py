"""Training a video autoencoder, as Step-Video-T2V's was (arXiv 2502.10248, section 4.1).

Stages are runs that start from each other (configs/video): first without the head that reduces
once more (``model.head: none``); then with a fresh one, the rest frozen at first (``init_from``);
then with a discriminator. Losses: L1, KL, the perceptual distance of frames, and a hinge.

Shape suffixes: B clips, T frames, H height, W width, C channels, t h w Z of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Description, Part
from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.schema import Field, Schema
from step_jax.data.video import ClipBatches, ClipConfig, clip_schema, open_source, rows_of
from step_jax.data.video_files import Size
from step_jax.evaluation.video import Lpips, judge_reconstructions
from step_jax.interop.artifacts import InitFrom, Start, starting_point
from step_jax.models.context import ComputeDtype
from step_jax.models.video.discriminator import Discriminator
from step_jax.models.video.perceptual import Perceptual
from step_jax.models.video.vae import VideoVAE
from step_jax.runs import plots
from step_jax.runs.device_memory import fitting
from step_jax.runs.media import grid, save_clip
from step_jax.runs.session import RunConfig, Session
from step_jax.training.learner import Learning, learn
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.program import Program, Work
from step_jax.training.step import LossOutput
from step_jax.training.step import Part as LossPart

LEARNER, DISCRIMINATOR = "autoencoder", "discriminator"
_FROZEN = "perceptual/"  # what the names of the perceptual network's arrays begin with
_HELDOUT_SEED = 2**31  # scenes that training never draws


@dataclass(frozen=True)
class PerceptualLoss:
    """LPIPS of frames in the loss; ``coefficient`` of its mean beside the mean L1."""

    coefficient: float = 1.0
    network: Perceptual = Perceptual()

    def validate(self):
        checks.above(self, coefficient=0)


@dataclass(frozen=True)
class Adversarial:
    """A discriminator that learns beside the autoencoder.

    optimizer: None learns as the autoencoder does.
    coefficient: of its judgement in the autoencoder's loss.
    after: steps in which it learns alone, before that judgement counts.
    """

    model: Discriminator = Discriminator()
    optimizer: OptimizerConfig | None = None
    coefficient: float = 0.05
    after: int = 0

    def validate(self):
        checks.above(self, coefficient=0)
        checks.at_least(self, after=0)


@dataclass(frozen=True)
class Loss:
    """Beside the mean L1 of a clip's numbers.

    kl: coefficient of the latents' divergence from noise, in nats per number of the clip.
    """

    kl: float = 1e-6
    perceptual: PerceptualLoss | None = None
    adversarial: Adversarial | None = None

    def validate(self):
        checks.at_least(self, kl=0)


@dataclass(frozen=True)
class Training:
    """``batch_size`` clips of the largest bucket, of the others as many as have no more pixels."""

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    ema_decay: float | None = 0.999

    def validate(self):
        checks.at_least(self, steps=1, batch_size=1, accumulation=1)
        checks.decay(self, "ema_decay")


@dataclass(frozen=True)
class Evaluation:
    """Reconstructions of clips that training never sees.

    data: where they come from; None renders other scenes than training's, and is no evaluation of
      files.
    clips: how many of each bucket.
    every_steps: how often, beside at the end; 0 for never.
    lpips: the network that judges beside PSNR and SSIM.
    """

    data: ClipConfig | None = None
    clips: int = 8
    every_steps: int = 0
    lpips: Perceptual | None = None

    def validate(self):
        checks.at_least(self, clips=0, every_steps=0)


@dataclass(frozen=True)
class Config:
    """Train a video autoencoder on clips."""

    run: RunConfig
    training: Training
    data: ClipConfig
    model: VideoVAE | None = None
    init_from: InitFrom | None = None
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()
    optimizer: OptimizerConfig = AdamW()
    dtype: ComputeDtype = "float32"
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    loop: Literal["vae"] = "vae"

    def validate(self):
        if self.model is None and self.init_from is None:
            raise ConfigError("give a model, or init_from: what to start from")
        check_optimizer(self.optimizer, self.training.steps)
        if self.loss.adversarial is not None and self.loss.adversarial.optimizer is not None:
            check_optimizer(self.loss.adversarial.optimizer, self.training.steps)
        for size in self.data.buckets:
            if self.model is not None:
                self.model.check_size(*size)
            if self.loss.perceptual is not None:
                self.loss.perceptual.network.check_size(*size[1:])
            if self.evaluation.lpips is not None:
                self.evaluation.lpips.check_size(*size[1:])
        self.run.profile.check(self.training.steps)


# --- the loss ------------------------------------------------------------------------------------


def make_loss(config: Loss, model: VideoVAE, sharding: Sharding):
    """(parameters, batch, key) -> sums; see the module's docstring.

    ``batch["judged"]`` says how much the discriminator's judgement counts by now.
    """

    def loss(params, batch, key) -> LossOutput:
        video_BTHWC = batch["video"]
        B, T = video_BTHWC.shape[:2]
        mean, logvar = model.encode(params[LEARNER], video_BTHWC, sharding)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        latents = mean + jnp.exp(0.5 * logvar) * noise
        made_BTHWC = model.decode(params[LEARNER], latents, T, sharding)
        numbers = jnp.float32(video_BTHWC.size)
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        parts = {
            "l1": LossPart(jnp.sum(jnp.abs(made_BTHWC - video_BTHWC)), numbers),
            "kl": LossPart(kl, numbers, config.kl),
        }
        squared = jnp.sum(jnp.square(made_BTHWC - video_BTHWC))
        metrics = {"squared_error": (squared, numbers), "latent_std": _deviation(mean)}
        if (perceptual := config.perceptual) is not None:
            frozen = {n.removeprefix(_FROZEN): a for n, a in batch.items() if n.startswith(_FROZEN)}
            pictures = [x.reshape(B * T, *x.shape[2:]) for x in (video_BTHWC, made_BTHWC)]
            distance_N = perceptual.network.distance(frozen, *pictures)
            weight = jnp.float32(B * T)
            parts["perceptual"] = LossPart(jnp.sum(distance_N), weight, perceptual.coefficient)
        if (adversarial := config.adversarial) is not None:
            own, more = _hinge(adversarial, params[DISCRIMINATOR], batch, made_BTHWC, sharding)
            parts, metrics = parts | own, metrics | more
        return LossOutput(parts, metrics)

    return loss


def _deviation(mean_BthwZ):
    """(sum, weight) of the latents' deviation from zero in one batch."""
    return jnp.sqrt(jnp.mean(jnp.square(mean_BthwZ))), jnp.float32(1)


def _hinge(config: Adversarial, params, batch, made_BTHWC, sharding: Sharding):
    """The parts of both learners: each trains one and leaves the other as it is."""
    judge = config.model.apply
    fixed = jax.lax.stop_gradient(params)
    fooled = judge(fixed, made_BTHWC, sharding).astype(jnp.float32)
    real = judge(params, batch["video"], sharding).astype(jnp.float32)
    made = judge(params, jax.lax.stop_gradient(made_BTHWC), sharding).astype(jnp.float32)
    patches = jnp.float32(real.size)
    hinge = jnp.sum(jax.nn.relu(1 - real) + jax.nn.relu(1 + made)) / 2
    parts = {
        "adversarial": LossPart(-batch["judged"] * jnp.sum(fooled), patches, config.coefficient),
        "discriminator": LossPart(hinge, patches),
    }
    right = jnp.sum((real > 0).astype(jnp.float32) + (made < 0)) / 2
    return parts, {"discriminator_right": (right, patches)}


# --- what is compiled ----------------------------------------------------------------------------


def frozen_schema(config: Loss) -> Schema:
    """Arrays of a batch that are the same in every step."""
    if config.perceptual is None:
        return {}
    shapes = config.perceptual.network.shapes()
    return {f"{_FROZEN}{n}": Field((None,) * len(shape), shape) for n, shape in shapes.items()}


def batch_schema(config: Loss, size: Size, rows: int) -> Schema:
    """What a step reads of a bucket, without what never changes."""
    judged: dict[str, Field] = {}
    if config.adversarial is not None:
        judged["judged"] = Field((), ())
    return {**clip_schema(size, rows), **judged}


def learnings_of(config: Config, begin: Start, sharding: Sharding) -> dict[str, Learning]:
    steps = config.training.steps
    learnings = {
        LEARNER: learn(
            begin.model,
            config.optimizer,
            total_steps=steps,
            sharding=sharding,
            average=config.training.ema_decay,
            freeze=begin.freeze,
            lora=begin.lora,
        )
    }
    if (adversarial := config.loss.adversarial) is not None:
        learnings[DISCRIMINATOR] = learn(
            adversarial.model,
            adversarial.optimizer or config.optimizer,
            total_steps=steps,
            sharding=sharding,
        )
    return learnings


def rows_by_bucket(config: Config, buckets: tuple[Size, ...], sharding: Sharding):
    """Rows of each bucket's batches."""
    devices = np.prod([sharding.size(axis) for axis in ("pipeline", "data", "fsdp", "expert")])
    return rows_of(buckets, config.training.batch_size, int(devices) * config.training.accumulation)


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles: the step of the largest bucket (others have one of their own)."""
    begin = starting_point(config.model, config.init_from, sharding, VideoVAE, arrays=False)
    rows = rows_by_bucket(config, config.data.buckets, sharding)
    largest = max(rows, key=lambda size: np.prod(size))
    return make_program(config, begin, sharding, largest, rows[largest])


def make_program(
    config: Config, begin: Start, sharding: Sharding, size: Size, rows: int
) -> Program:
    models: dict[str, Any] = {LEARNER: begin.model}
    if config.loss.adversarial is not None:
        models[DISCRIMINATOR] = config.loss.adversarial.model
    return Program.build(
        make_loss(config.loss, begin.model, sharding),
        models,
        learnings_of(config, begin, sharding),
        {**batch_schema(config.loss, size, rows), **frozen_schema(config.loss)},
        sharding,
        total_steps=config.training.steps,
        work=Work(rows * size[0], "frames", dtype=config.dtype),
        seed=config.run.seed,
        accumulation=config.training.accumulation,
        notes=("every bucket of clips has a program of its own",),
    )


# --- the loop ------------------------------------------------------------------------------------


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains; returns the figures of ``judge_reconstructions`` on held-out clips.

    Args:
      force: try a step that needs more memory than a device has.
    """
    seed, steps = config.run.seed, config.training.steps
    with Session(config) as session:
        sharding, say = session.sharding, session.reporter.event
        begin = starting_point(
            config.model, config.init_from, sharding, VideoVAE, session.goes_on_from
        )
        source = open_source(config.data, seed, say)
        rows = rows_by_bucket(config, source.buckets, sharding)
        for size in rows:
            begin.model.check_size(*size)
        batches = ClipBatches(source, rows, seed)
        heldout = Heldout.of(config, say)
        built = {n: make_program(config, begin, sharding, n, rows[n]) for n in rows}
        frozen = frozen_arrays(config.loss, sharding)
        device = jax.local_devices()[0]
        train_step = {n: fitting(p.compile, device, force) for n, p in built.items()}
        largest = built[max(rows, key=lambda size: np.prod(size))]
        state, start = session.start(
            largest,
            begin.given(LEARNER),
            check=lambda meta, step: batches.check(meta["data"], step),
        )
        session.describe(
            config,
            describe(config, begin),
            {},
            header(config, begin, largest, rows),
            units={"loss": "L1 of a number, and the other parts", "loss/l1": "of a number"},
            meta={"data": batches.fingerprint},
        )
        best = largest.learnings[LEARNER].best
        for step in range(start, steps):
            size = batches.size_at(step)
            part = process_rows(sharding, rows[size])
            clips = batches.batch(step, *part) | judged(config.loss, step)
            schema = batch_schema(config.loss, size, rows[size])
            session.before(step)
            state, metrics = train_step[size](state, to_mesh(sharding, schema, clips) | frozen)
            session.finished(step + 1, state, metrics)
            if heldout.due(step + 1):
                with session.aside():
                    evaluate(session, begin.model, best(state.learners[LEARNER]), heldout, step + 1)
        session.flush()
        return finish(session, begin.model, best(state.learners[LEARNER]), heldout)


def frozen_arrays(config: Loss, sharding: Sharding) -> dict[str, jax.Array]:
    """The perceptual network's weights on the mesh; they are no part of the state."""
    if config.perceptual is None:
        return {}
    weights = {f"{_FROZEN}{n}": a for n, a in config.perceptual.network.load().items()}
    return to_mesh(sharding, frozen_schema(config), weights)


def judged(config: Loss, step: int) -> dict[str, np.ndarray]:
    """How much the discriminator's judgement counts in a step."""
    if config.adversarial is None:
        return {}
    return {"judged": np.array(step >= config.adversarial.after, np.float32)}


def describe(config: Config, begin: Start) -> Description:
    parts = {LEARNER: begin.part(average=config.training.ema_decay is not None)}
    if config.loss.adversarial is not None:
        parts[DISCRIMINATOR] = Part(config.loss.adversarial.model)
    return Description(config.loop, parts, dtype=config.dtype, origin=begin.origin)


def header(config: Config, begin: Start, built: Program, rows: Mapping[Size, int]):
    model = begin.model
    sizes = ", ".join(f"{n} of {'x'.join(map(str, size))}" for size, n in rows.items())
    return {
        "parameters": spec_lib.count(built.learnings[LEARNER].model_specs),
        "reduction": f"{' x '.join(map(str, model.reduction))}, {model.latents} channels",
        "batches": sizes,
        "steps": config.training.steps,
    }


@dataclass(frozen=True)
class Heldout:
    """Clips to reconstruct, and who judges."""

    clips: list[np.ndarray]
    every_steps: int
    lpips: Lpips | None

    @classmethod
    def of(cls, config: Config, say) -> Heldout:
        c = config.evaluation
        lpips = None if c.lpips is None else Lpips(c.lpips)
        data = c.data
        if data is None and config.data.kind == "scenes":
            data = config.data
        if data is None or not c.clips:
            return cls([], 0, lpips)
        source = open_source(data, _HELDOUT_SEED, say)
        clips = []
        for size in source.buckets:
            count = source.count(size)
            most = c.clips if count is None else min(count, c.clips)
            # spread over the set, not the beginning of its first file
            numbers = np.arange(most) * ((count or most) // most)
            clips += [source.clip(size, int(number)) for number in numbers]
        return cls(clips, c.every_steps, lpips)

    def due(self, step: int) -> bool:
        return bool(self.clips and self.every_steps and step % self.every_steps == 0)


def reconstructed(model: VideoVAE, params, clips: list[np.ndarray], sharding: Sharding):
    """The clips through the means of their latents, one at a time."""

    def through(p, video_BTHWC):
        mean, _ = model.encode(p, video_BTHWC)
        return model.decode(p, mean, video_BTHWC.shape[1])

    compiled = jax.jit(through, out_shardings=sharding.replicated())
    return [np.asarray(compiled(params, clip[None])[0]) for clip in clips]


def evaluate(session: Session, model: VideoVAE, params, heldout: Heldout, step: int):
    """Figures of held-out clips, and pictures: originals above what became of them."""
    made = reconstructed(model, params, heldout.clips, session.sharding)
    result = judge_reconstructions(heldout.clips, made, chunk=model.chunk, lpips=heldout.lpips)
    session.reporter.evaluation(step, result, "heldout")
    if session.primary:
        write_pictures(session, heldout.clips, made, step)
    return result


def write_pictures(session: Session, clips, made, step: int, most: int = 4):
    """One file for each size: a GIF, or a PNG of pictures."""
    by_size: dict[Size, list[int]] = {}
    for i, clip in enumerate(clips):
        by_size.setdefault(clip.shape[:3], []).append(i)
    for size, numbers in by_size.items():
        chosen = numbers[:most]
        shown = grid(np.stack([x[i] for x in (clips, made) for i in chosen]), len(chosen))
        ending = "gif" if size[0] > 1 else "png"
        name = f"step_{step}_{'x'.join(map(str, size))}.{ending}"
        save_clip(shown, session.directory.samples / name, zoom=max(1, 128 // size[1]))


def finish(session: Session, model: VideoVAE, params, heldout: Heldout) -> dict[str, float]:
    """Figures of the trained model, and the curve of its loss."""
    steps, result = session.total_steps, {}
    if heldout.clips:
        result = evaluate(session, model, params, heldout, steps)
    if session.primary:
        plots.plot_run(session.directory.path, session.directory.plots / "loss.png")
    session.reporter.summary({"status": "done", **result})
    return result
