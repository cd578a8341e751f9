"""The step of ``step-jax pretrain``, for step_time.py."""

from __future__ import annotations

import protocol

shape = protocol.arguments()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from step_jax.core import rng  # noqa: E402
from step_jax.core import spec as spec_lib  # noqa: E402
from step_jax.core.sharding import MeshConfig, Sharding  # noqa: E402
from step_jax.data.packing import text_schema  # noqa: E402
from step_jax.models import expert_health  # noqa: E402
from step_jax.models.context import Execution  # noqa: E402
from step_jax.models.layers.attention import MHA  # noqa: E402
from step_jax.models.layers.initialisation import Fixed  # noqa: E402
from step_jax.models.layers.mlp import SwiGLU  # noqa: E402
from step_jax.models.layers.moe import Experts, MoE  # noqa: E402
from step_jax.models.layers.routing import Router  # noqa: E402
from step_jax.models.text.decoder import Block, Decoder, Group  # noqa: E402
from step_jax.training.learner import Learning  # noqa: E402
from step_jax.training.losses.text import packed_text_loss  # noqa: E402
from step_jax.training.optimizers.build import make_optimizer  # noqa: E402
from step_jax.training.optimizers.config import AdamW  # noqa: E402
from step_jax.training.program import Program, Work  # noqa: E402
from step_jax.training.schedules import Constant  # noqa: E402


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
    sharding = Sharding.build(MeshConfig(), jax.devices()[:1])
    specs = decoder.specs()
    config = AdamW(learning_rate=3e-4, schedule=Constant())
    optimizer = make_optimizer(config, specs, total_steps=1000)
    text_loss = packed_text_loss(decoder, Execution(dtype=shape["dtype"]), sharding)
    program = Program.build(
        lambda params, batch, key: text_loss(params["model"], batch),
        {"model": decoder},
        {"model": Learning(specs, specs, optimizer)},
        text_schema(shape["batch"], shape["seq"]),
        sharding,
        total_steps=1000,
        work=Work(shape["batch"] * shape["seq"], dtype=shape["dtype"]),
        seed=0,
        report=lambda params, stats: expert_health.report(decoder, params["model"], stats),
    )
    step, state = program.step, program.initial_state(rng.fold(0, 0, "init"))
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
