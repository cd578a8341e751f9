"""What runs between the steps of reinforcement learning, for its plan: writing and judging."""

from __future__ import annotations

from dataclasses import replace

import jax

from step_jax.core.sharding import bytes_on_device
from step_jax.inference.engine import bucket
from step_jax.inference.phases import cache_bytes, reading, writing
from step_jax.inference.slots import Decoding
from step_jax.models.text.decoder import Decoder
from step_jax.trainers.rl.config import Config
from step_jax.trainers.rl.layouts import layout
from step_jax.trainers.rl.rollouts import slots_on
from step_jax.trainers.rl.trajectory import schema
from step_jax.training.program import Phase, Program


def phases_of(config: Config, policy: Decoder, built: Program, judge) -> tuple[Phase, ...]:
    """Reading prompts, writing answers of which every one is as long as it may be, judging.

    Args:
      built: the step. judge: what ``learning.make_judge`` made, jitted.
    """
    return (*rollouts(config, policy, built), judging(config, built, judge))


def rollouts(config: Config, policy: Decoder, built: Program) -> tuple[Phase, Phase]:
    """Reading and writing; of the caches half is read, on average over an answer."""
    c, r = config.training, config.rollout
    where = layout(config, built.sharding)
    decoding = Decoding.of(policy, r.context, config.execution, where, None, r.replay_routing)
    ways, slots = where.ways("batch"), slots_on(config, where)
    prompt = min(bucket(r.max_prompt_tokens), r.context)
    turns = r.max_new_tokens * max(1.0, c.rows / slots)
    begun = r.max_prompt_tokens / r.context
    read = reading(decoding, ways, prompt, calls=-(-c.prompts // ways) / c.updates)
    write = writing(decoding, slots, filled=(1 + begun) / 2, calls=turns / c.updates)
    beside = bool(built.sharding.spare)
    held = 0.0 if beside else kept(built)
    # the caches are there while further prompts are read
    caches = cache_bytes(decoding, slots)
    return (
        replace(read, held=held + caches, beside=beside),
        replace(write, held=held, beside=beside),
    )


def kept(built: Program) -> float:
    """Bytes of a device that the learners and the reference always take."""
    return bytes_on_device(built.state_like) + bytes_on_device(built.beside)


def judging(config: Config, built: Program, judge) -> Phase:
    """What a batch is compared with, before it is learned from."""
    c = config.training
    T = built.schema["tokens"].shape[1]
    whole = built.sharding.replicated()
    batch = {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=whole)
        for name, field in schema(c.rows, T).items()
    }
    params = {name: learner.params for name, learner in built.state_like.learners.items()}
    read = bytes_on_device(params) + bytes_on_device(built.beside)
    return Phase(
        name=f"judging {c.rows:,} answers",
        lower=lambda: judge.lower(params, built.beside, batch),
        function="judge",
        sharding=built.sharding,
        calls=1 / c.updates,
        reads=read,
        held=kept(built) - read,
    )
