"""The Python of the README and of docs/ works when it is pasted as it stands, page by page.

All pages run in one temporary folder, where ``configs/quickstart.yaml`` is a recipe of seconds and
``~/texts`` a few files, so that the README's own block trains the ``runs/mine`` of later pages.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

from step_jax.cli.main import main

ROOT = Path(__file__).parents[1]
QUICKSTART = """
run: {directory: runs/mine, logging: {sinks: []}}
model:
  width: 16
  layers:
    - repeat: 1
      blocks:
        - attention: {kind: mha, heads: 2, head_dim: 8}
          mlp: {kind: swiglu, hidden: 16}
training: {steps: 1000, batch_size: 8}
data: {path: ~/texts, vocab_size: 400, sequence_length: 64}
optimizer: {kind: adamw, learning_rate: 1e-2, schedule: {kind: constant}}
execution: {dtype: float32}
evaluation: {every_steps: 0, tokens: 500}
sample: {tokens: 0}
"""
#: in the order in which they need each other
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where somebody might sit with a checkout, texts of his own and a downloaded model."""
    path = tmp_path_factory.mktemp("guides")
    (path / "configs").mkdir()
    (path / "configs/quickstart.yaml").write_text(QUICKSTART)
    (path / "texts").mkdir()
    for source in (ROOT / "step_jax/core").glob("*.py"):
        shutil.copy(source, path / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HOME", str(path))
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def mine(folder):
    """The run that the README trains and later pages go on with."""
    if not (folder / "runs/mine").exists():
        run(PAGES[0])


@pytest.fixture(scope="module")
def checkpoint(folder, mine):
    """The folder of Hugging Face that pages speak of, whose tokenizer has a chat template."""
    assert main(["export", "runs/mine", "checkpoint"]) == 0
    for file in (folder / "checkpoint").glob("tokenizer*"):
        file.unlink()
    for file in (ROOT / "tests/golden/chat_tokenizer").iterdir():
        shutil.copy(file, folder / "checkpoint")


def run(page: str) -> dict[str, object]:
    """What is defined after all blocks of a page, run one after the other."""
    module = types.ModuleType(re.sub(r"\W", "_", page))
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    try:
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page}, block {number}", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module.__dict__


LONG = ("docs/training.md", "docs/generation.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.thorough if page in LONG else ())
        for page in PAGES
        if blocks(page)
    ],
)
def test_a_page_works_as_it_stands(page, folder, request):
    if page != PAGES[0]:
        request.getfixturevalue("mine")
    if page in ("docs/interop.md", "docs/tokenizers.md"):
        request.getfixturevalue("checkpoint")
    run(page)


@pytest.mark.thorough
def test_the_attention_kind_of_the_guide_decodes_as_it_trains():
    """Its cache, windows and rotations are those of the full forward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from step_jax.models.context import Context, Execution
    from step_jax.models.layers.initialisation import Fixed
    from step_jax.models.layers.mlp import SwiGLU
    from step_jax.models.text.decoder import Block, Decoder, Group
    from step_jax.models.tokens import Tokens
    from tests.models import small

    shared = run("docs/adding_an_attention_kind.md")["Shared"]
    block = Block(shared(heads=3, head_dim=8), SwiGLU(16))
    decoder = Decoder(16, (Group(1, (block,)),), vocab=11, init=Fixed(0.3))
    execution = Execution(dtype="float32")

    params = small.params(decoder)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    positions_BT = jnp.broadcast_to(jnp.arange(6), tokens_BT.shape)

    @functools.partial(jax.jit, compiler_options=small.FAST_COMPILE)
    def hidden(params, tokens_BT, positions_BT, cache=None):
        ctx = Context(Tokens(positions_BT), execution=execution)
        return decoder.hidden(params, tokens_BT, ctx, cache)[:2]

    full, _ = hidden(params, tokens_BT, positions_BT)
    cache, steps = decoder.init_cache(2, 6, jnp.float32), []
    for t in range(6):
        x, cache = hidden(params, tokens_BT[:, t : t + 1], positions_BT[:, t : t + 1], cache)
        steps.append(x)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), full, rtol=1e-4, atol=1e-5)
