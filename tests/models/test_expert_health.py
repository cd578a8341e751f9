"""What is reported of experts, and an exploding one that raises the alarm before the loss.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.data.packing import text_schema
from step_jax.models import expert_health
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.layers.moe import Experts, ExpertStats, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import MTP, Block, Decoder, Group
from step_jax.runs.expert_alarm import ExpertAlarm, ExpertHealth
from step_jax.training.learner import Learning
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW
from step_jax.training.schedules import Constant
from step_jax.training.state import init_state
from step_jax.training.step import make_train_step
from tests.models import small

SCHEMA = text_schema(*small.packed_batch()["tokens"].shape)
MIXTURE = MoE(
    (Experts(8, 16),), Router(2, score="sigmoid", bias=True, bias_rate=1e-2, group_loss=1e-3)
)
MIXTURE_WITH_DROPS = replace(MIXTURE, capacity=0.75)
BLOCK = Block(small.KINDS["mfa"], MIXTURE)


def decoder(mixture: MoE = MIXTURE, **changes) -> Decoder:
    block = replace(BLOCK, mlp=mixture)
    return Decoder(small.WIDTH, (Group(2, (block,)),), small.VOCAB, init=FanIn(), **changes)


def loss_fn(c: Decoder):
    text_loss = packed_text_loss(c, small.execution(), None)
    return lambda params, batch, key: text_loss(params["model"], batch)


def learnings(c: Decoder, config: AdamW):
    specs = c.specs()
    return {"model": Learning(specs, specs, make_optimizer(config, specs, total_steps=100))}


def mlp_of(state):
    return state.learners["model"].params.groups[0][0].mlp


def report_of(c: Decoder, p, batch):
    stats = loss_fn(c)({"model": p}, batch, None).sums
    return expert_health.report(c, p, stats)


@pytest.mark.thorough
def test_report_finds_the_odd_expert():
    c, batch = decoder(mtp=MTP(1, BLOCK)), small.packed_batch()
    p = small.params(c)
    report = jax.jit(lambda p: report_of(c, p, batch), compiler_options=small.FAST_COMPILE)
    usual = report(p)
    assert 1 <= usual["moe/load_max"] <= 4 and 0 <= usual["moe/load_min"] <= 1
    assert 0 < usual["moe/entropy"] <= 1 and 0 < usual["moe/confidence"] <= 1
    assert usual["moe/dropped"] == 0
    assert usual["moe/weight_max"] < 1.2 and usual["moe/activation_max"] < 4
    experts = p.groups[0][0].mlp.experts[0]
    gate = experts.gate_EDF.copy()
    gate[1, 5] *= 30.0
    mlp = p.groups[0][0].mlp.replace(experts=(experts.replace(gate_EDF=gate),))
    odd = report(p.replace(groups=((p.groups[0][0].replace(mlp=mlp),),)))
    assert (odd["moe/weight_layer"], odd["moe/weight_expert"]) == (1, 5)
    assert (odd["moe/activation_layer"], odd["moe/activation_expert"]) == (1, 5)
    assert odd["moe/weight_max"] > 10 and odd["moe/activation_max"] > 8


def test_activations_are_those_of_what_an_expert_computed():
    """Expert 2 computed a quarter of what it was sent, expert 3 nothing; all rows are alike."""
    c, none_E = decoder(), np.zeros((2, 8), np.float32)
    load_E, dropped_E = none_E + 8, none_E.copy()
    dropped_E[1, 2], dropped_E[1, 3] = 6, 8
    stats = ExpertStats(
        tokens=np.float32([32, 32]), load_E=load_E, probability_E=none_E, squared=none_E[:, 0],
        entropy=none_E[:, 0], confidence=none_E[:, 0], square_E=4 * (load_E - dropped_E),
        dropped_E=dropped_E, chosen_BTK=None,
    )  # fmt: skip
    report = expert_health.report(c, small.params(c), [stats])
    assert report["moe/activation_max"] == report["moe/activation_min"] == 1
    assert report["moe/load_max"] == 1 and report["moe/dropped"] == 14 / 128


def test_a_model_without_experts_reports_nothing():
    c = small.decoder("mfa")
    assert expert_health.report(c, small.params(c), []) == {}


def trained(c: Decoder, steps: int, explode_at: int | None):
    """(loss, health) of every step on text with structure; one expert may be made to explode."""
    how = learnings(c, AdamW(3e-3, Constant(), clip_norm=1.0))
    step = jax.jit(
        make_train_step(
            loss_fn(c), how, SCHEMA, compute_dtype=jnp.float32,
            report=lambda params, sums: expert_health.report(c, params["model"], sums),
        ),
        compiler_options=small.FAST_COMPILE,
    )  # fmt: skip
    state = init_state({"model": c.initialise(jax.random.key(0))}, how)
    found = []
    for i in range(steps):
        batch = small.packed_batch(seed=i)
        tokens = batch["tokens"] // 8  # few kinds of tokens, each followed by its successor
        tokens = (tokens[:, :1] + np.arange(tokens.shape[1])) % 8
        batch |= {"tokens": tokens, "targets": (tokens + 1) % 8}
        if explode_at is not None and i >= explode_at:
            held = state.learners["model"]
            block = held.params.groups[0][0]
            experts = jax.tree.map(
                lambda w_LEIO: w_LEIO.at[1, 3].multiply(1.2), block.mlp.experts[0]
            )
            block = block.replace(mlp=block.mlp.replace(experts=(experts,)))
            params = held.params.replace(groups=((block,),))
            state = state.replace(learners={"model": held.replace(params=params)})
        state, metrics = step(state, batch)
        found.append({k: float(v) for k, v in metrics.items()})
    return found


@pytest.mark.slow
def test_an_exploding_expert_raises_the_alarm_before_the_loss_shows_it():
    c, explode_at, steps = decoder(), 40, 60
    healthy, sick = trained(c, steps, None), trained(c, steps, explode_at)
    calm = ExpertAlarm(ExpertHealth())
    assert not [text for i, m in enumerate(healthy) for text in calm.check(i, m)]
    alarm = ExpertAlarm(ExpertHealth())
    said = [(i, text) for i, m in enumerate(sick) for text in alarm.check(i, m)]
    first = said[0][0]
    assert explode_at < first and "expert 3 of expert layer 1" in said[0][1]
    # the loss shows it once it leaves what the healthy run's own last losses spread over
    before = [m["loss"] for m in healthy[explode_at - 10 :]]
    band = 3 * np.std(np.diff(before)) + 1e-3
    apart = [
        i
        for i, (a, b) in enumerate(zip(healthy, sick, strict=True))
        if b["loss"] - a["loss"] > band
    ]
    assert apart, "the loss never shows it: nothing was early"
    assert first < apart[0]


@pytest.mark.slow
def test_loads_move_the_selection_bias():
    """Overloaded experts' biases fall and idle ones' rise, by the rate, whatever the loss.

    With a capacity: microbatches drop what the whole batch does.
    """
    c, batch = decoder(MIXTURE_WITH_DROPS), small.packed_batch()
    how = learnings(c, AdamW(1e-3, Constant(), clip_norm=1e-3))
    state = init_state({"model": jax.tree.map(jnp.asarray, small.params(c))}, how)
    old = mlp_of(state).bias_E
    loads, steps = {}, {}

    def record(params, sums):
        names = {f"load{i}_{e}": sums[0].load_E[i, e] for i in range(2) for e in range(8)}
        return names | {"dropped": jnp.sum(sums[0].dropped_E)}

    for accumulation in (1, 4):
        step = make_train_step(
            loss_fn(c), how, SCHEMA, compute_dtype=jnp.float32, accumulation=accumulation,
            report=record,
        )  # fmt: skip
        new, metrics = jax.jit(step, compiler_options=small.FAST_COMPILE)(state, batch)
        loads_LE = np.array([[metrics[f"load{i}_{e}"] for e in range(8)] for i in range(2)])
        expected = -1e-2 * np.sign(loads_LE - loads_LE.mean(1, keepdims=True))
        moved = mlp_of(new).bias_E - old
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)
        loads[accumulation] = loads_LE
        steps[accumulation] = new.learners["model"].params, metrics
        assert metrics["dropped"] > 20
        assert float(metrics["grad_norm"]) < 1e3  # loads are not part of the gradient's norm
    np.testing.assert_array_equal(loads[1], loads[4])
    error, leaf = small.worst_leaf(steps[4], steps[1])
    assert error <= 1e-5, leaf


@pytest.mark.slow
def test_a_frozen_router_does_not_move():
    frozen = replace(MIXTURE, router=replace(MIXTURE.router, frozen=True))
    c = decoder(frozen)
    how = learnings(c, AdamW(1e-2, Constant()))
    state = init_state({"model": jax.tree.map(jnp.asarray, small.params(c))}, how)
    step = make_train_step(loss_fn(c), how, SCHEMA, compute_dtype=jnp.float32)
    new, _ = jax.jit(step, compiler_options=small.FAST_COMPILE)(state, small.packed_batch())
    old_mlp, new_mlp = mlp_of(state), mlp_of(new)
    np.testing.assert_array_equal(new_mlp.router_DE, old_mlp.router_DE)
    np.testing.assert_array_equal(new_mlp.bias_E, old_mlp.bias_E)
    assert np.any(new_mlp.experts[0].gate_EDF != old_mlp.experts[0].gate_EDF)


def test_dropped_assignments_are_reported():
    alarm = ExpertAlarm(ExpertHealth(dropped=0.1, memory=5))
    quiet = {"moe/load_max": 1.0, "moe/activation_max": 1.0, "moe/weight_max": 1.0}
    assert alarm.check(0, {}) == []
    assert alarm.check(0, quiet | {"moe/dropped": 0.05}) == []
    (text,) = alarm.check(1, quiet | {"moe/dropped": 0.2})
    assert "20.0% of the assignments were dropped" in text
    assert alarm.check(2, quiet | {"moe/dropped": 0.2}) == []  # said once


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="growth above 1"):
        ExpertHealth(growth=1.0).validate()
