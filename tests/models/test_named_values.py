"""What full remat keeps by name, on the device or in its host's memory: nothing is computed else.

``Execution.keep`` and ``Execution.offload``.
"""

from __future__ import annotations

from collections import Counter

import jax
import pytest

from step_jax.core.errors import ConfigError
from step_jax.models.context import Execution
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from tests.models import small, test_pipeline
from tests.models.test_decoder import ALL, assert_same, computed, equations

NAMES = ("layer", "qkv", "attention", "mlp")
SPLIT = {"remat": "full", "keep": ("mlp",), "offload": ("layer", "qkv", "attention")}
ALL_OFF = {"remat": "full", "offload": NAMES}


def traced(model: Decoder, batch=None, **changes):
    f = small.loss_and_gradient(model, **changes)
    batch = small.packed_batch(rows=2) if batch is None else batch
    return list(equations(jax.make_jaxpr(f)(small.params(model), batch).jaxpr))


def offloaded(model: Decoder, *names: str) -> Counter:
    """Shapes of what goes to the host's memory in one turn of the layers."""
    found = traced(model, remat="full", offload=names)
    moves = [e.outvars[0].aval for e in found if e.primitive.name == "device_put"]
    return Counter(a.shape for a in moves if "<host>" in str(a))


def test_what_is_kept_or_offloaded_changes_nothing():
    assert_same(computed("mfa", **SPLIT), computed("mfa"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SPLIT, ALL_OFF, ALL_OFF | {"scan": False}], ids=str)
def test_what_is_kept_or_offloaded_changes_nothing_for_any_kind(changes):
    assert_same(computed(*ALL, **changes), computed(*ALL), 1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "model,axes",
    [
        ("mixed", {"fsdp": 2, "expert": 2, "tensor": 2}),
        pytest.param("dense", {"context": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param(
            "dense", {"pipeline": 2, "pipeline_rounds": 2, "fsdp": 4}, marks=pytest.mark.slow
        ),
    ],
)
def test_on_a_mesh_too(model, axes, monkeypatch):
    monkeypatch.setitem(test_pipeline.CASES, "offloaded", (axes, ALL_OFF))
    test_pipeline.check(model, "offloaded")


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_of_attention_has_the_names(kind):
    model, attention = small.decoder(kind), small.KINDS[kind]
    score, value = attention.score_and_value_widths()
    B, T, N, K = 2, 16, attention.heads, attention.kv
    assert offloaded(model, "layer") == {(B, T, small.WIDTH): 1}
    expected = Counter([(B, T, N, score), (B, T, K, score), (B, T, K, value)])
    assert offloaded(model, "qkv") == expected
    log_sums = (B, K, N // K, T, 1)
    assert offloaded(model, "attention") == {(B, K, N // K, T, value): 1, log_sums: 1}


@pytest.mark.parametrize("mlp", [small.MLP, GELU(48), MoE((Experts(4, 48),), Router(2))], ids=str)
def test_every_kind_of_mlp_has_the_name(mlp):
    model = Decoder(small.WIDTH, (Group(2, (Block(small.KINDS["mfa"], mlp),)),), small.VOCAB)
    rows = 2 * 16 * (2 if isinstance(mlp, MoE) else 1)
    assert offloaded(model, "mlp") == {(rows, 48): 1 if isinstance(mlp, GELU) else 2}


def test_of_a_group_of_blocks_every_blocks_input_is_named():
    assert offloaded(small.decoder("mha", "mfa"), "layer") == {(2, 16, small.WIDTH): 2}


def test_what_has_a_name_is_not_computed_again():
    def products(**changes) -> int:
        equations = traced(small.decoder("mfa"), remat="full", **changes)
        return sum(e.primitive.name == "dot_general" for e in equations)

    again = products()
    assert products(keep=("attention",)) == again - 2  # scores and what they weigh
    assert products(keep=("mlp",)) == again - 2  # both factors
    # queries, keys, values; not the queries' bottleneck, which a weight's gradient needs
    assert products(keep=("qkv",)) == products(offload=("qkv",)) == again - 3
    assert products(keep=("qkv", "attention", "mlp")) == again - 7


def test_names_that_nothing_would_read_are_refused():
    with pytest.raises(ConfigError, match="exceptions from remat: full; remat is dots"):
        Execution(remat="dots", keep=("mlp",)).validate()
    with pytest.raises(ConfigError, match="name something twice: mlp, mlp"):
        Execution(remat="full", keep=("mlp",), offload=("mlp",)).validate()
