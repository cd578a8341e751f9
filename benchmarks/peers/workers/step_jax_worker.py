"""The step of ``step-jax pretrain``, for step_time.py."""

from __future__ import annotations

import functools

import protocol

shape = protocol.arguments()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from step_jax.core import rng  # noqa: E402
from step_jax.core import spec as spec_lib  # noqa: E402
from step_jax.models import expert_health  # noqa: E402
from step_jax.models.context import Context, Execution  # noqa: E402
from step_jax.models.layers.attention import MHA  # noqa: E402
from step_jax.models.layers.initialisation import Fixed  # noqa: E402
from step_jax.models.layers.mlp import SwiGLU  # noqa: E402
from step_jax.models.layers.moe import Experts, MoE  # noqa: E402
from step_jax.models.layers.routing import Router  # noqa: E402
from step_jax.models.text.decoder import Block, Decoder, Group  # noqa: E402
from step_jax.models.tokens import Tokens  # noqa: E402
from step_jax.training.losses.text import language_model_loss  # noqa: E402
from step_jax.training.optimizers.build import make_optimizer  # noqa: E402
from step_jax.training.optimizers.config import AdamW  # noqa: E402
from step_jax.training.schedules import Constant  # noqa: E402
from step_jax.training.state import init_state  # noqa: E402
from step_jax.training.step import LossOutput, make_train_step  # noqa: E402


def mlp() -> SwiGLU | MoE:
    if not shape["experts"]:
        return SwiGLU(shape["hidden"])
    return MoE((Experts(shape["experts"], shape["hidden"]),), Router(shape["top_k"]))


def main() -> None:
    attention = MHA(shape["heads"], shape["head_dim"], kv_heads=shape["kv_heads"])
    block = Block(attention, mlp())
    decoder = Decoder(
        width=shape["width"],
        layers=(Group(shape["layers"], (block,)),),
        vocab=shape["vocab"],
        init=Fixed(0.02),
    )
    execution = Execution(dtype=shape["dtype"])
    config = AdamW(learning_rate=3e-4, schedule=Constant())

    def loss(params, batch, key):
        ctx = Context(Tokens.packed(batch), execution=execution)
        return LossOutput(*language_model_loss(params, decoder, batch, ctx))

    specs = decoder.specs()
    optimizer = make_optimizer(config, specs, total_steps=1000)
    train_step = make_train_step(
        loss,
        optimizer,
        clip_norm=config.clip_norm,
        compute_dtype=jnp.dtype(shape["dtype"]),
        report=functools.partial(expert_health.report, decoder),
    )
    step = jax.jit(train_step, donate_argnums=0)
    state = jax.jit(lambda k: init_state(decoder.initialise(k), optimizer))(rng.fold(0, 0, "init"))
    rows = np.random.default_rng(0).integers(0, shape["vocab"], (shape["batch"], shape["seq"] + 1))
    batch = {
        "tokens": rows[:, :-1].astype(np.int32),
        "targets": rows[:, 1:].astype(np.int32),
        "weights": np.ones((shape["batch"], shape["seq"]), np.float32),
        "segments": np.ones((shape["batch"], shape["seq"]), np.int32),
        "positions": np.tile(np.arange(shape["seq"], dtype=np.int32), (shape["batch"], 1)),
    }
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    for steps in protocol.requests(spec_lib.count(specs), f"jax {jax.__version__}"):
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))


main()
