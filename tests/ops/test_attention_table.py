"""The table of docs/architecture.md: what each implementation of attention computes or refuses."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, make_mesh
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.ops import attention as ops
from tests.devices import CPU, HOPPER, TPU
from tests.models.small import run
from tests.ops.test_attention import definition, ring

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
DEVICES = {"pallas_tpu": TPU, "pallas_gpu": HOPPER}
KINDS = {
    "MHA, heads of 128": MHA(4, 128),
    "GQA, heads of 128": MHA(4, 128, kv_heads=2),
    "MFA, heads of 256": MFA(4, 256),
    "MFA-KR, heads of 256": MFA(4, 256, value="gated_key"),
    "MLA, heads of 192 and 128": MLA(4, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
}


def table() -> dict[str, dict[str, str]]:
    """What is asked for -> implementation -> the entry."""
    (found,) = re.findall(r"\| asked for (\|.*?)\n\n", PAGE.read_text(), re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.split("\n")]
    names, _, *rows = rows
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}


def described(tokens: int):
    """Masks and biases by what they are in the table; all others are causal."""
    positions = np.arange(tokens, dtype=np.int32)[None]
    mask = ops.Mask(positions, positions, in_order=True)
    halves = 1 + (positions >= tokens // 2).astype(np.int32)
    blocks = np.where(positions % 4 == 0, -1, positions // 4).astype(np.int32)
    return {
        "documents of packed rows": (mask.with_queries(positions % (tokens // 2), halves, None)
            .with_keys(positions % (tokens // 2), halves, None), None),
        "a sliding window": (mask.replace(window=5), None),
        "no causality": (mask.replace(causal=False), None),
        "a window without causality": (mask.replace(causal=False, window=5), None),
        "blocks that see each other": (
            mask.replace(q_blocks_BT=blocks, kv_blocks_BS=blocks, window=5), None
        ),
        "ALiBi": (mask, "linear"),
    }  # fmt: skip


def asked(row: str, tokens: int):
    """(mask, bias, query heads, key heads, widths of scores and values)."""
    if row in KINDS:
        kind = KINDS[row]
        mask, bias = described(tokens)["a sliding window"]
        return mask.replace(window=None), bias, kind.heads, kind.kv, kind.score_and_value_widths()
    return *described(tokens)[row], 4, 2, (128, 128)


CASES = [(row, name) for row, entries in table().items() for name in entries]


def test_the_table_has_every_kind_demand_and_implementation():
    assert set(table()) == {*KINDS, *described(8)}
    names = {name for name in ops.IMPLEMENTATIONS if not name.endswith("_interpret")}
    assert all(set(entries) == {*names, "ring"} for entries in table().values())


@pytest.mark.parametrize("row,name", [case for case in CASES if case[1] in DEVICES])
def test_a_kernel_takes_what_the_table_says_and_refuses_the_rest_by_name(row, name):
    tokens, device = 4096, DEVICES[name]
    mask, bias, N, K, (H, V) = asked(row, tokens)
    shapes = ((1, tokens, N, H), (1, tokens, K, H), (1, tokens, K, V))
    arrays = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    problem = ops.problem_of(*arrays, mask, bias)
    entry = table()[row][name]
    if entry == "yes":
        assert ops.resolve(name, problem, device) == name
        return
    reason = re.escape(entry.removeprefix("no: "))
    with pytest.raises(ConfigError, match=f"{name} cannot do this: .*{reason}"):
        ops.resolve(name, problem, device)
    assert ops.resolve("auto", problem, device) == "xla"


@pytest.mark.parametrize("row", table())
def test_what_runs_anywhere_computes_all_of_the_table(row):
    """``reference`` and ``xla`` on one device and ``ring`` on two, against the definition."""
    assert {table()[row][name] for name in ("reference", "xla", "ring")} == {"yes"}
    mask, bias, N, K, (H, V) = asked(row, 16)
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((1, 16, N, H), (1, 16, K, H), (1, 16, K, V))
    )
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])

    def all_three(q, k, v):
        common = {"scale": H**-0.5, "alibi": bias}
        return [
            ops.attention(q, k, v, mask, implementation="reference", **common),
            ops.attention(q, k, v, mask, implementation="xla", **common),
            ring(mesh, q, k, v, mask, **common),
        ]

    expected = definition(q, k, v, mask, H**-0.5, bias)
    for got in run(all_three, q, k, v):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_nothing_but_kernels_depends_on_the_device():
    for row in table():
        mask, bias, N, K, (H, V) = asked(row, 16)
        shapes = ((1, 16, N, H), (1, 16, K, H), (1, 16, K, V))
        arrays = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
        assert ops.resolve("auto", ops.problem_of(*arrays, mask, bias), CPU) == "xla"
