"""The flow-matching loop: its parts against definitions, learning, exact resume, meshes.

Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.errors import DataError, ExitCode
from step_jax.core.spec import map_specs
from step_jax.data.digits import Digits
from step_jax.inference.flow import euler
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.vision.image_transformer import ImageTransformer
from tests.trainers.loops import run_loop, steps

pytest.importorskip("sklearn")

RECIPE = """
run:
  directory: {run}
  checkpoint: {{every_steps: 40}}
  logging: {{sinks: []}}
model:
  width: 16
  depth: 2
  attention: {{kind: mha, heads: 2, head_dim: 8, position: null}}
  mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: 80, batch_size: 32, samples: 4, euler_steps: 2}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
"""
MODEL = ImageTransformer(16, 2, MHA(2, 8, position=None), SwiGLU(32))
FP32 = Execution(dtype="float32")


def recipe(folder: Path, run: str = "run") -> str:
    path = folder / f"{run}.yaml"
    path.write_text(RECIPE.format(run=folder / run))
    return str(path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder / "run", run_loop("flow-matching", recipe(folder))


@pytest.fixture(scope="module")
def velocity():
    """The model with every parameter alive: (images, times, classes) -> velocity."""
    rng = np.random.default_rng(0)
    params = map_specs(lambda s: jnp.array(0.2 * rng.standard_normal(s.shape)), MODEL.specs())
    return jax.jit(lambda x, t, c: MODEL.apply(params, x, t, c, FP32))


def test_every_patch_sees_every_other_and_time_and_class(velocity):
    """With the last patch changed the first one's velocity changes too: attention is not causal."""
    x = np.random.default_rng(1).standard_normal((1, 8, 8, 1)).astype(np.float32)
    time, klass = jnp.array([0.3]), jnp.array([4])
    before = velocity(x, time, klass)
    changed = x.copy()
    changed[0, -2:, -2:] += 1
    for other in (
        velocity(changed, time, klass),
        velocity(x, time + 0.1, klass),
        velocity(x, time, klass + 1),
    ):
        assert np.abs(other - before)[0, :2, :2].max() > 1e-3
    assert before.shape == x.shape and before.dtype == jnp.float32


def test_patches_are_put_back_where_they_came_from():
    x = np.arange(2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1)
    patches = MODEL._patches(x)
    np.testing.assert_array_equal(patches[0, 5], [18, 19, 26, 27])  # second row, second column
    np.testing.assert_array_equal(MODEL._image(patches), x)


def test_euler_follows_the_field():
    """dx/dt = x: after n steps (1 + 1/n)^n; dx/dt = t: the left sum (n - 1) / 2n."""
    x = jnp.ones((3, 2))
    np.testing.assert_allclose(euler(lambda x, t: x, x, 8), 1.125**8 * x, rtol=1e-6)
    np.testing.assert_allclose(
        euler(lambda x, t: jnp.broadcast_to(t[:, None], x.shape), 0 * x, 8), 7 / 16 + 0 * x
    )


def test_batches_depend_on_seed_and_step_alone():
    digits = Digits.load()
    assert digits.images_BHWC.min() == -1 and digits.images_BHWC.max() == 1
    whole = digits.batch(0, 7, 16)
    halves = [digits.batch(0, 7, 16, i, 2) for i in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
    assert (digits.batch(0, 8, 16)["images"] != whole["images"]).any()
    assert (digits.batch(1, 7, 16)["images"] != whole["images"]).any()


def test_it_learns(straight):
    """A third of the first loss is gone: what the mean image of a class and time explain."""
    losses = [r["loss"] for r in steps(straight[0])]
    assert np.mean(losses[-10:]) < 0.67 * losses[0]


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits.load()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.patch", "3"], "patch 3 does not divide the image size 8"),
        (["--model.size", "16"], "digits are of size 8"),
        (["--training.samples", "0"], "samples must be above 0"),
        (["--optimizer.learning-rate", "step_law"], "step_law is a law of pretraining tokens"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, capsys, flags, message):
    assert main(["flow-matching", recipe(tmp_path), *flags]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
