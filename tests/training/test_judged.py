"""Losses of judged answers: how they lie in rows changes nothing. T tokens, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import PreferenceConfig
from step_jax.data.batches import to_mesh
from step_jax.data.preferences import preference_schema
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.text.reward import RewardModel
from step_jax.training.learner import learn
from step_jax.training.losses.judged import bradley_terry_loss, preference_loss
from step_jax.training.losses.preference import DPO, KTO, BradleyTerry
from step_jax.training.optimizers.config import AdamW
from step_jax.training.program import Program, Work
from step_jax.training.schedules import Constant

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
EXECUTION = Execution(dtype="float32", loss_chunks=2)
T, V = 24, 19
MLPS = {
    "dense": SwiGLU(16),
    "experts": MoE((Experts(4, 8),), router=Router(top_k=2, balance_loss=0.1)),
}


def decoder(mlp: str = "dense") -> Decoder:
    block = Block(MFA(heads=2, head_dim=4), MLPS[mlp])
    return Decoder(8, (Group(1, (block,)),), V, init=Fixed(0.5))


def examples(rows: int, K: int, places) -> dict[str, np.ndarray]:
    """Eight examples, drawn alike whatever the layout: the i-th in row and slot ``places[i]``."""
    config = PreferenceConfig(sequence_length=T, examples_per_row=K)
    schema = preference_schema(rows, config, verdicts=True, reference=True)
    batch = {name: np.zeros(f.shape, f.dtype) for name, f in schema.items()}
    batch["number"] = np.arange(rows * K, dtype=np.int32).reshape(rows, K)
    rng, used = np.random.default_rng(0), np.zeros(rows, int)
    for i, (row, k) in enumerate(places):
        batch["judged"][row, k] = 1
        batch["good"][row, k] = i % 3 > 0
        batch["reference"][row, :, k] = rng.normal(size=2) - 12
        asked = rng.integers(1, 4)
        room = 0
        for side in range(2):
            ids = rng.integers(0, V, asked + rng.integers(2, 5))
            place = slice(used[row], used[row] + len(ids))
            batch["tokens"][row, side, place] = ids
            batch["targets"][row, side, place][:-1] = ids[1:]
            batch["weights"][row, side, place][asked - 1 : -1] = 1
            batch["segments"][row, side, place] = k + 1
            batch["positions"][row, side, place] = np.arange(len(ids))
            room = max(room, len(ids))
        used[row] += room
    return batch


ALONE = examples(8, 1, [(i, 0) for i in range(8)])
#: three rows of unlike fullness and one of padding
PACKED = examples(4, 3, [(0, 0), (2, 0), (0, 1), (1, 0), (0, 2), (2, 1), (1, 1), (2, 2)])
LOSSES = {"dpo": DPO(), "kto": KTO(), "reward": BradleyTerry(centre=0.1)}


def first_step(how, mlp: str, batch, accumulation: int) -> dict[str, float]:
    """What a step says of a batch."""
    rows, K = batch["judged"].shape
    config = PreferenceConfig(sequence_length=T, examples_per_row=K)
    verdicts, judged = isinstance(how, KTO), isinstance(how, BradleyTerry)
    schema = preference_schema(rows, config, verdicts=verdicts, reference=not judged)
    if judged:
        model = RewardModel(decoder(mlp))
        loss = bradley_terry_loss(how, model, EXECUTION, ONE)
    else:
        model = decoder(mlp)
        loss = preference_loss(how, model, EXECUTION, ONE, examples=rows * K)
    adamw = AdamW(learning_rate=1e-2, schedule=Constant(warmup_steps=0))
    program = Program.build(
        lambda params, batch, key: loss(params["model"], batch),
        {"model": model},
        {"model": learn(model, adamw, total_steps=1, sharding=ONE)},
        schema,
        ONE,
        total_steps=1,
        work=Work(1),
        seed=0,
        accumulation=accumulation,
    )
    state = program.initial_state(jax.random.key(0))
    if judged:  # a fresh score is 0, whose gradient says nothing of the trunk
        held = state.learners["model"]
        params = held.params.replace(score_D=jnp.linspace(-1, 1, 8))
        state = state.replace(learners={"model": held.replace(params=params)})
    step = program.compile()
    _, metrics = step(state, to_mesh(ONE, schema, {name: batch[name] for name in schema}))
    return {k: float(v) for k, v in metrics.items() if "weight" not in k}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("loss", "mlp"),
    [
        pytest.param("kto", "experts", marks=pytest.mark.slow),  # test_sft.py has a mixture
        ("reward", "dense"),
        pytest.param("dpo", "experts", marks=pytest.mark.slow),  # less than kto
    ],
)
def test_packing_and_accumulation_change_neither_loss_nor_gradient_nor_metrics(loss, mlp):
    """However unevenly examples are spread over rows and microbatches."""
    want = first_step(LOSSES[loss], mlp, ALONE, 1)
    got = first_step(LOSSES[loss], mlp, PACKED, 2)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert want["grad_norm"] > 1e-3 and ("loss/routing" in want) == (mlp == "experts")
