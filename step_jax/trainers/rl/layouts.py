"""Where answers are written: as the policy is trained, laid out otherwise, or on other devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.inference.engine import Engine
from step_jax.inference.served import Served
from step_jax.models.text.decoder import Decoder
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.config import Config
from step_jax.trainers.rl.outside import served
from step_jax.trainers.rl.rollouts import make_engine

Send = Callable[[Any], Any]


@dataclass(frozen=True)
class Writer:
    """What writes answers.

    Attributes:
      engine: it.
      send: copies the policy's parameters to where it reads them; None if that is where they are.
      beside: it writes on devices of its own, while the policy learns.
    """

    engine: Engine | Served
    send: Send | None = None
    beside: bool = False


def layout(config: Config, sharding: Sharding) -> Sharding:
    """The mesh that answers are written on, of ``sharding``'s devices or those it leaves out."""
    if config.rollout.parallel is None:
        return sharding
    devices = sharding.spare or [*sharding.mesh.devices.flat]
    return Sharding.build(config.rollout.parallel, devices).for_inference()


def writer(config: Config, policy: Decoder, tokenizer: Tokenizer, sharding: Sharding) -> Writer:
    """What writes the answers that are learned from.

    Raises:
      ConfigError, DataError: a server that does not answer or has no such model; several processes
        of other devices or a server: parameters leave their devices inside one alone.
    """
    rollout = config.rollout
    if jax.process_count() > 1 and (rollout.server is not None or sharding.spare):
        raise ConfigError(
            f"rollout.{'server' if rollout.server else 'parallel'}: {jax.process_count()} "
            "processes drive the devices, and parameters leave their devices inside one alone; "
            "leave it out, or parallel.spare (learning and writing take turns)"
        )
    if rollout.server is not None:
        engine = served(rollout.server, policy, tokenizer, rollout, config.run.seed)
        return Writer(engine, jax.device_get, beside=True)
    return own_writer(config, policy, tokenizer, sharding, layout(config, sharding))


def heldout_writer(config: Config, policy: Decoder, tokenizer: Tokenizer, sharding) -> Writer:
    """What writes the answers to held-out problems: never others than the policy's devices."""
    where = sharding if sharding.spare else layout(config, sharding)
    temperature = config.evaluation.temperature
    return own_writer(config, policy, tokenizer, sharding, where, temperature)


def own_writer(
    config: Config,
    policy: Decoder,
    tokenizer: Tokenizer,
    sharding: Sharding,
    where: Sharding,
    temperature: float | None = None,
) -> Writer:
    """Our engine on a mesh; ``temperature`` is by default that of rollouts."""
    if temperature is None:
        temperature = config.rollout.temperature
    engine = make_engine(config, policy, tokenizer, where, temperature)
    if where is sharding:
        return Writer(engine)
    dtype = config.execution.dtype
    send = sender(policy, dtype, sharding, where)
    return Writer(engine, send, beside=bool(sharding.spare))


def sender(policy: Decoder, dtype: str, source: Sharding, target: Sharding) -> Send:
    """Copies parameters in the compute dtype from mesh to mesh, device to device."""
    specs = policy.specs()
    cast = jax.jit(lambda p: spec_lib.cast(p, dtype, specs), out_shardings=source.params(specs))
    there = target.params(specs)
    return lambda params: jax.device_put(cast(params), there)
