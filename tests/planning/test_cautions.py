"""What a plan points out, and what it would become with a change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from step_jax.core.command_line import load_config
from step_jax.core.hardware import CHIPS
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.planning import topology
from step_jax.planning.case import Case, Held
from step_jax.planning.cautions import cautions, dropped
from step_jax.planning.changes import changes
from step_jax.planning.collectives import Traffic
from step_jax.trainers import pretrain
from step_jax.training.scaling_laws import step_law_batch_tokens
from tests.planning.test_plan import RECIPE

WIDE, MLP = MFA(8, 256), SwiGLU(1024)


def case(attention=WIDE, mlp=MLP, vocab=2048, rows=8) -> Case:
    model = Decoder(512, (Group(2, (Block(attention, mlp),)),), vocab)
    sharding = Sharding.build(MeshConfig(tensor=2, fsdp=4))
    return Case(model, pretrain.Config.execution, rows, 4096, 1, sharding, Held(0, 0, 0, 0))


def test_a_plan_without_fault_is_not_cautioned():
    law = step_law_batch_tokens(1e9)
    sums = [Traffic("reduce-scatter", "fsdp", 1, 1e9), Traffic("all-reduce", "data", 1, 1e9)]
    assert cautions(case(rows=int(law // 4096)), CHIPS["v6e"], sums, 1e9) == []
    assert cautions(None, None, [], None) == []


@pytest.mark.parametrize(
    "changed,chip,words",
    [
        ({"attention": MFA(8, 128)}, "v6e", "heads of 128 fill 50% of v6e's matrix units"),
        ({"attention": MFA(8, 64)}, "v5p", "heads of 64 fill 50% of v5p's matrix units"),
        ({"mlp": SwiGLU(600)}, "v5p", "hidden units of 300 fill 78%"),  # on each of two devices
        ({"mlp": MoE((Experts(8, 320),), Router(2))}, "v6e", "experts of 160 fill 62%"),
        ({"vocab": 300}, "v5e", "a vocabulary of 150 fill 59%"),
    ],
)
def test_widths_that_waste_the_matrix_units_are_named(changed, chip, words):
    (found,) = cautions(case(**changed), CHIPS[chip], [], None)
    assert found.startswith(words)


def test_sums_where_scatters_would_do_are_named():
    sent = [
        Traffic("all-gather", "fsdp", 1, 1e9),
        Traffic("all-reduce", "fsdp+context", 1, 4e9),
        Traffic("all-reduce", "fsdp", 1, 1e7),  # of norms, not worth a word
    ]
    (found,) = cautions(None, None, sent, None)
    assert found.startswith("4GB of sums over fsdp+context are all-reduces")


def test_a_batch_far_from_the_law_is_named_in_pretraining_alone():
    law = step_law_batch_tokens(1e12)
    (few,) = cautions(case(rows=8), None, [], 1e12)
    assert f"{law / (8 * 4096):.2g} times below Step Law's" in few
    (many,) = cautions(case(rows=10_000), None, [], 1e9)
    assert "times above Step Law's" in many
    assert cautions(case(rows=8), None, [], None) == []


def test_a_capacity_that_drops_at_random_is_named():
    narrow = MoE((Experts(64, 256),), Router(2), capacity=1.0)
    (found,) = cautions(case(mlp=narrow), None, [], None)
    assert found.startswith(f"capacity 1 drops {dropped(4096, 2, 64, 1.0):.1%} of the assignments")
    assert cautions(case(mlp=replace(narrow, capacity=1.5)), None, [], None) == []


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25])
def test_the_dropped_share_is_that_of_random_choices(factor):
    """4,096 tokens that choose 2 of 64 experts, 400 times."""
    rng = np.random.default_rng(0)
    counts = rng.binomial(4096, 2 / 64, (400, 64))
    room = int(np.ceil(4096 * 2 * factor / 64))
    share = np.maximum(counts - room, 0).sum() / counts.sum()
    assert dropped(4096, 2, 64, factor) == pytest.approx(share, rel=0.05, abs=2e-4)


# --- Changes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("changes") / "small.yaml"
    path.write_text(RECIPE)
    return load_config(pretrain.Config, [str(path)]).config


def test_each_change_is_what_a_recipe_that_says_so_is_estimated_to_be(config):
    at = topology.parse("gpu:h200x8")
    found = {c.change: c for c in changes(pretrain, config, at)}
    assert list(found) == [
        "as it stands", "remat none", "remat dots", "accumulation 2", "twice the batch",
        "rows twice as long", "half the batch", "rows half as long",
    ]  # fmt: skip
    training, data = config.training, config.data
    said = {
        "twice the batch": replace(config, training=replace(training, batch_size=32)),
        "rows half as long": replace(
            config,
            training=replace(training, batch_size=32),
            data=replace(data, sequence_length=64),
        ),
        "accumulation 2": replace(config, training=replace(training, accumulation=2)),
        "remat none": replace(config, execution=replace(config.execution, remat="none")),
    }
    for change, recipe in said.items():
        as_it_stands = changes(pretrain, recipe, at)[0]
        assert replace(as_it_stands, change=change) == found[change]
    own = found["as it stands"]
    assert found["remat none"].nbytes > own.nbytes and found["remat none"].step_s < own.step_s
    assert found["twice the batch"].step_s > own.step_s


def test_what_has_no_estimates_has_no_changes(config):
    assert changes(pretrain, config, topology.parse("cpu:8")) == []
