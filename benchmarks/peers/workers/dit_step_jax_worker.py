"""The step of ``step-jax diffusion``, for dit_step_time.py."""

from __future__ import annotations

import protocol

shape = protocol.arguments()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from step_jax.core import rng  # noqa: E402
from step_jax.core import spec as spec_lib  # noqa: E402
from step_jax.core.sharding import MeshConfig, Sharding  # noqa: E402
from step_jax.interop.artifacts import Start  # noqa: E402
from step_jax.models.context import Execution  # noqa: E402
from step_jax.models.layers.attention import MHA  # noqa: E402
from step_jax.models.layers.mlp import GELU  # noqa: E402
from step_jax.models.layers.norm import RMSNorm  # noqa: E402
from step_jax.models.layers.positions import Rope  # noqa: E402
from step_jax.models.video.dit import VideoDiT  # noqa: E402
from step_jax.models.video.patches import places_of  # noqa: E402
from step_jax.models.video.text_inputs import States  # noqa: E402
from step_jax.runs.session import RunConfig  # noqa: E402
from step_jax.trainers.diffusion import flow_matching  # noqa: E402
from step_jax.trainers.diffusion.sources import LatentData  # noqa: E402
from step_jax.training.optimizers.config import AdamW  # noqa: E402
from step_jax.training.schedules import Constant  # noqa: E402


def main() -> None:
    heads, head = shape["heads"], shape["head_dim"]
    width, size = heads * head, tuple(shape["size"])
    axes = (head // 2, head // 4, head // 4)
    model = VideoDiT(
        width=width,
        depth=shape["layers"],
        attention=MHA(heads, head, qk_norm=RMSNorm(1e-6), position=Rope(axes=axes)),
        mlp=GELU(4 * width),
        channels=shape["channels"],
        text=(States("llm", shape["text_width"], shape["text"], "mlp"),),
    )
    rows = shape["batch"]
    config = flow_matching.Config(
        run=RunConfig(directory="unused"),
        model=model,
        data=LatentData("unused", (size,)),
        training=flow_matching.Training(steps=1000, batch_size=rows, ema_decay=None),
        optimizer=AdamW(learning_rate=3e-4, schedule=Constant()),
        execution=Execution(dtype=shape["dtype"]),
    )
    sharding = Sharding.build(MeshConfig(), jax.devices()[:1])
    (of_batch,) = flow_matching.shapes_of(config, model, sharding)
    program = flow_matching.make_program(config, Start(model), of_batch, sharding)
    step, state = program.compile(), program.initial_state(rng.fold(0, 0, "init"))
    drawn = np.random.default_rng(0)
    batch = {
        "patches": drawn.standard_normal((rows, of_batch.tokens, model.numbers), np.float32),
        "places": np.tile(places_of(size, model.patch), (rows, 1, 1)),
        "samples": np.arange(rows, dtype=np.uint32)[:, None],
        "text/llm": drawn.standard_normal(
            (rows, 1, shape["text"], shape["text_width"]), np.float32
        ),
        "lengths/llm": np.full((rows, 1), shape["text"], np.int32),
    }
    batch = jax.device_put(batch, sharding.mesh.devices.flat[0])
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    count = spec_lib.count(model.specs())
    for steps in protocol.requests(count, f"jax {jax.__version__}"):
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))


main()
