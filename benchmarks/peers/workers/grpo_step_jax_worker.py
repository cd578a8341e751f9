"""``step-jax rl``, held at the beginning of a step until grpo.py asks for more."""

from __future__ import annotations

import tempfile

import protocol

shape = protocol.arguments()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import grpo_verifier  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from step_jax.checkpoint.config import CheckpointConfig  # noqa: E402
from step_jax.core import spec as spec_lib  # noqa: E402
from step_jax.core.sharding import MeshConfig, Sharding  # noqa: E402
from step_jax.environments.files import FileTask  # noqa: E402
from step_jax.environments.tasks import TaskConfig  # noqa: E402
from step_jax.interop.artifacts import InitFrom, load_artifact  # noqa: E402
from step_jax.models.context import Execution  # noqa: E402
from step_jax.runs.session import RunConfig, Session  # noqa: E402
from step_jax.trainers.rl import learning, loop  # noqa: E402
from step_jax.trainers.rl.config import (  # noqa: E402
    AlgorithmConfig,
    Config,
    Evaluation,
    Rollout,
    Training,
)
from step_jax.trainers.rl.samples import Sample  # noqa: E402
from step_jax.training.optimizers.config import AdamW  # noqa: E402
from step_jax.training.schedules import Constant  # noqa: E402

EXECUTION = Execution(dtype="float32", loss_chunks=1)
PHASES = protocol.Phases()


def recipe(folder: str) -> Config:
    """``configs/rl/addition.yaml`` with another task, and GRPO as the peers have it."""
    return Config(
        run=RunConfig(directory=folder, checkpoint=CheckpointConfig(every_steps=10**6)),
        training=Training(steps=10**6, prompts=shape["prompts"], samples=shape["group"]),
        rollout=Rollout(
            max_new_tokens=shape["new"],
            max_prompt_tokens=shape["prompt"],
            slots=shape["prompts"] * shape["group"],
        ),
        problems=TaskConfig(FileTask(shape["problems"], grpo_verifier.Even(), answer=None)),
        algorithm=AlgorithmConfig("grpo", kl=shape["kl"]),
        init_from=InitFrom(f"hf:{shape['start']}"),
        optimizer=AdamW(
            learning_rate=shape["rate"], schedule=Constant(), weight_decay=0.0, clip_norm=1.0
        ),
        execution=EXECUTION,
        parallel=MeshConfig(),
        evaluation=Evaluation(problems=0),
    )


def numbers() -> dict:
    """Advantages, loss and norm of the gradient of the one trajectory that all are given."""
    sharding = Sharding.build(MeshConfig(), jax.devices()[:1])
    start, policy = (load_artifact(f"hf:{shape[name]}", sharding) for name in ("start", "policy"))
    model, given = policy.model, json.loads(Path(shape["trajectory"]).read_text())
    samples = [
        Sample(
            i // shape["group"],
            i % shape["group"],
            np.asarray(row["tokens"], np.int32),
            np.asarray(row["logprobs"], np.float32),
            np.zeros(len(row["tokens"]), np.int32),
            np.ones(len(row["tokens"]), bool),
            "length",
            row["reward"],
        )
        for i, row in enumerate(given)
    ]
    prompts = [row["prompt"] for row in given]
    T = max(len(p) + len(s.tokens) for p, s in zip(prompts, samples, strict=True))
    t = learning.trajectory(samples, prompts, shape["group"], T)
    how = AlgorithmConfig("grpo", kl=shape["kl"]).resolved(shape["new"])
    ctx = learning.context(t, EXECUTION, sharding)
    likelihoods = jax.jit(lambda p, t: learning.likelihoods(p, model, t, ctx, 1.0)[0])
    t = t.replace(old_BT=t.logprobs_BT, reference_BT=np.asarray(likelihoods(start.params, t)))
    t = how.judged(t)
    loss_of = learning.make_loss(how, {"policy": model}, EXECUTION, sharding, 1.0)

    def loss(params, batch):
        return sum(loss_of({"policy": params}, batch, None).values().values())

    value, grads = jax.jit(jax.value_and_grad(loss))(policy.params, t.batch())
    first = np.asarray([len(prompt) - 1 for prompt in prompts])
    return {
        "advantages": np.asarray(t.advantages_BT)[np.arange(len(first)), first].tolist(),
        "loss": float(value),
        "gradient": float(optax.global_norm(grads)),
    }


class Turns:
    """Holds the loop until more steps are asked for; the first two are warm-up."""

    def __init__(self, about: dict):
        self.about, self.left, self.asked, self.state = about, 2, None, None

    def before(self, step: int) -> None:
        if not self.left:
            jax.block_until_ready(self.state)
            self.asked = self.asked or self._requests()
            self.left = next(self.asked, 0)
            if not self.left:
                raise SystemExit(0)
        self.left -= 1

    def _requests(self):
        parameters = spec_lib.count(self.state.learners["policy"].params)
        version = f"jax {jax.__version__}"
        return protocol.requests(parameters, version, PHASES, **self.about)


def main() -> None:
    turns = Turns({"numbers": numbers()})
    finished = Session.finished

    def kept(session, step, state, *args, **kwargs):
        turns.state = state
        jax.block_until_ready(state)  # what is left of it is not the next rollout's
        return finished(session, step, state, *args, **kwargs)

    Session.before, Session.finished = turns.before, kept
    loop.Rollouts.batch = PHASES.wrapped("rollout", loop.Rollouts.batch)
    with tempfile.TemporaryDirectory() as folder:
        loop.run(recipe(f"{folder}/run"))


if __name__ == "__main__":
    main()
