"""What the documentation shows works."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_attention_example_decodes_as_it_trains(monkeypatch):
    """The example of docs/adding_an_attention_kind.md, run as it stands."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from step_jax.models.context import Context, Execution
    from step_jax.models.layers.initialisation import Fixed
    from step_jax.models.layers.mlp import SwiGLU
    from step_jax.models.text.decoder import Block, Decoder, Group
    from step_jax.models.tokens import Tokens

    page = (ROOT / "docs/adding_an_attention_kind.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    header = """
from dataclasses import dataclass
from typing import Any, ClassVar
from flax import struct
from step_jax.core.spec import ParamSpec
from step_jax.models.layers.attention.core import attend
from step_jax.models.context import through_cache
from step_jax.models.layers.positions import Position, Rope, rotate
from step_jax.ops.einsum import einsum
"""
    module = types.ModuleType("attention_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(header + example, module.__dict__)
    block = Block(module.Shared(heads=3, head_dim=8), SwiGLU(16))
    decoder = Decoder(16, (Group(1, (block,)),), vocab=11, init=Fixed(0.3))
    execution = Execution(dtype="float32")

    @jax.jit
    def both(tokens_BT):
        params = decoder.initialise(jax.random.key(0))
        positions_BT = jnp.broadcast_to(jnp.arange(6), tokens_BT.shape)
        whole = Context(Tokens(positions_BT), execution=execution)
        full, *_ = decoder.hidden(params, tokens_BT, whole)
        cache, steps = decoder.init_cache(2, 6, jnp.float32), []
        for t in range(6):
            ctx = Context(Tokens(positions_BT[:, t : t + 1]), execution=execution)
            x, cache, _ = decoder.hidden(params, tokens_BT[:, t : t + 1], ctx, cache)
            steps.append(x)
        return full, jnp.concatenate(steps, 1)

    full, decoded = both(jax.random.randint(jax.random.key(1), (2, 6), 0, 11))
    np.testing.assert_allclose(decoded, full, rtol=1e-4, atol=1e-5)
