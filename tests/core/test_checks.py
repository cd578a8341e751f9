"""Numbers that cannot work are refused with their key, before data and devices."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from step_jax.core.command_line import load_config
from step_jax.core.config import parse_config, validate
from step_jax.core.errors import ConfigError
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Execution
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import Decoder
from step_jax.models.video.dit import VideoDiT
from step_jax.runs.profiling import ProfileConfig
from step_jax.runs.session import RunConfig
from step_jax.trainers import LOOPS, find_loop
from step_jax.training.optimizers.config import AdamW

ROOT = Path(__file__).parents[2]


def decoder(attention: str, mlp: str = "{kind: swiglu, hidden: 8}", rest: str = "") -> str:
    block = f"{{attention: {attention}, mlp: {mlp}}}"
    return f"{{width: 8, layers: [{{repeat: 1, blocks: [{block}]}}]{rest}}}"


MHA = "{kind: mha, heads: 2, head_dim: 4%s}"
MFA = "{kind: mfa, heads: 2, head_dim: 4%s}"
MLA = "{kind: mla, heads: 2, kv_rank: 4, nope_dim: 4, rope_dim: 4, value_dim: 4%s}"
MOE = "{kind: moe, experts: [{count: 4, hidden: 8}], router: {top_k: 1%s}%s}"


@pytest.mark.parametrize(
    ("attention", "mlp", "rest", "message"),
    [
        (MHA % ", kv_heads: 0", None, "", "kv_heads is 0; it must be at least 1"),
        ("{kind: mha, heads: -2, head_dim: 4}", None, "", "heads is -2"),
        ("{kind: mha, heads: 2, head_dim: 0}", None, "", "head_dim is 0"),
        (MFA % ", query_rank: 0", None, "", "query_rank is 0"),
        ("{kind: mfa, heads: 0, head_dim: 4}", None, "", "heads is 0"),
        (MLA % ", query_rank: -1", None, "", "query_rank is -1"),
        (MHA % ", qk_norm: {eps: -1}", None, "", "eps is -1.0; it must be at least 0"),
        (MHA % "", "{kind: swiglu, hidden: 8, clamp: -1}", "", "clamp is -1.0; it must be above 0"),
        (MHA % "", MOE % ("", ", shared: -8"), "", "shared is -8"),
        (MHA % "", MOE % ("", ", common: -8"), "", "common is -8"),
        (MHA % "", MOE % ("", ", shared_clamp: 0"), "", "shared_clamp is 0.0"),
        (MHA % "", MOE % (", balance_loss: -0.1", ""), "", "balance_loss is -0.1"),
        (MHA % "", MOE % (", group_loss: -0.1", ""), "", "group_loss is -0.1"),
        (MHA % "", MOE % (", z_loss: -0.1", ""), "", "z_loss is -0.1"),
        (MHA % "", MOE % (", bias: true, bias_rate: -0.1", ""), "", "bias_rate is -0.1"),
        (MHA % "", MOE % (", scale: 0", ""), "", "scale is 0.0; it must be above 0"),
        (MHA % "", MOE % (", z_loss: inf", ""), "", "z_loss is inf"),
        (MHA % "", None, ", init: {kind: fixed, std: -1}", "std is -1.0"),
        (MHA % "", None, ", init: {kind: fan_in, gain: -1}", "gain is -1.0"),
        (
            MHA % "",
            None,
            f", mtp: {{heads: 1, weight: -1, block: {{attention: {MHA % ''}, "
            "mlp: {kind: swiglu, hidden: 8}}}",
            "weight is -1.0",
        ),
    ],
)
def test_a_model_number_that_cannot_work_is_refused(attention, mlp, rest, message):
    text = decoder(attention, mlp or "{kind: swiglu, hidden: 8}", rest)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(Decoder, text)
    parse_config(Decoder, decoder(MHA % "", MOE % ("", "")))  # what is around them is sound


@pytest.mark.parametrize(
    ("schema", "text", "message"),
    [
        (Execution, "loss_chunks: 0", "loss_chunks is 0"),
        (AdamW, "learning_rate: inf", "learning_rate is inf"),
        (AdamW, "{learning_rate: 1, weight_decay: inf}", "weight_decay is inf"),
        (RMSNorm, "eps: -1e-5", "eps is -1e-05"),
        (
            VideoDiT,
            f"{{width: 8, depth: 1, attention: {MHA % ', position: null'}, "
            "mlp: {kind: gelu, hidden: 8}, channels: 0}",
            "channels is 0",
        ),
    ],
)
def test_other_numbers_that_cannot_work_are_refused(schema, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(schema, text)


#: A recipe of every loop, and the numbers that may be below 0.
RECIPES = {
    "pretrain": "quickstart.yaml",
    "sft": "sft/lora.yaml",
    "preference": "preference/dpo.yaml",
    "reward": "preference/reward.yaml",
    "rl": "rl/addition.yaml",
    "diffusion": "video/scenes.yaml",
    "video-preference": "video/stages/dpo_scenes.yaml",
    "video-rl": "video/stages/grpo_scenes.yaml",
    "vae": "video/vae_stage1.yaml",
}
ANY_SIGN = {
    "parallel.fsdp",
    "problems.workers.failure_score",
    "evaluation.right",
    "flow.density.mean",  # of a logit
}


def below_zero(
    value: Any, key: str = "", whole: Callable[[Any], Any] = lambda part: part
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(key, what makes the configuration with -1 there) for every number of a tree."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            inner = f"{key}.{f.name}".lstrip(".")

            def of_field(part, name=f.name):
                return whole(dataclasses.replace(value, **{name: part}))

            yield from below_zero(getattr(value, f.name), inner, of_field)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):

            def of_item(part, i=i):
                return whole((*value[:i], part, *value[i + 1 :]))

            yield from below_zero(item, f"{key}.{i}", of_item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, lambda: whole(type(value)(-1))


@pytest.mark.parametrize("loop", LOOPS)
def test_no_number_of_a_loop_is_below_zero_without_a_word(loop):
    """Intervals, coefficients, sizes, shares: whatever is not meant to have a sign has none."""
    config = load_config(find_loop(loop).Config, [str(ROOT / "configs" / RECIPES[loop])]).config
    accepted = set()
    for key, make in below_zero(config):
        with contextlib.suppress(ConfigError):
            validate(make())
            accepted.add(key)
    assert accepted <= ANY_SIGN


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, -(2**70)])
def test_a_seed_that_equals_another_or_overflows_is_refused(seed):
    """Keys are made of 32 bits: 2**32 would give the random numbers of 0."""
    message = rf"seed is {seed}; it must be from 0 to 4294967295"
    with pytest.raises(ConfigError, match=message):
        parse_config(RunConfig, f"{{directory: x, seed: {seed}}}")
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(seed=seed)
    parse_config(RunConfig, f"{{directory: x, seed: {2**32 - 1}}}")


def test_a_profile_beyond_the_end_of_the_run_is_refused():
    ProfileConfig(start_step=7, steps=3).check(10)
    ProfileConfig().check(1)
    with pytest.raises(ConfigError, match="traces steps 8 to 10, and the last step .* is 9"):
        ProfileConfig(start_step=8, steps=3).check(10)


def test_messages_recommend_only_packages_that_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[>=<]", item)[0] for group in groups for item in group}
    declared |= {name.split("[")[0] for name in declared}
    from step_jax.runs.sinks import _PACKAGES, SINKS

    assert {_PACKAGES.get(name, name) for name in SINKS} <= declared
    found = []
    for path in [*ROOT.glob("step_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
        for name in re.findall(r"pip install '?([\w\[\]-]+)", path.read_text()):
            found.append(name)
            assert name in declared, f"{path}: {name}"
    assert "jax[tpu]" in found and "scikit-learn" in found
