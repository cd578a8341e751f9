"""The Hopper kernels inside a model, on a mesh: traced with the check of what varies over it."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import jax
import pytest

from pallas_kernels.gpu import common
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.ops import attention as ops
from tests.models import small

KERNELS = dict.fromkeys(("attention", "grouped_matmul", "loss"), "pallas_gpu")
LAYERS = (
    Block(MFA(4, 64, window=100), SwiGLU(128)),
    Block(MHA(4, 64, kv_heads=2), MoE((Experts(4, 128),), Router(2))),
)
MODEL = Decoder(128, (Group(2, LAYERS),), vocab=256)


def gradients(sharding, **changes):
    step = small.loss_and_gradient(MODEL, sharding, **({"dtype": "bfloat16"} | KERNELS | changes))
    p, batch = small.params(MODEL), small.packed_batch(rows=8, length=256, vocab=256)
    return jax.make_jaxpr(step)(p, batch)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 2, "fsdp": 2}, {"data": 8}])
def test_every_kernel_is_part_of_a_step(monkeypatch, mesh):
    monkeypatch.setattr(common, "unsupported", lambda device: None)
    text = str(gradients(small.on_mesh(**mesh)))
    for kernel in (
        "mfa_attention_forward", "mfa_attention_dq", "mfa_attention_dk_dv",
        "grouped_matmul_rows", "grouped_matmul_matrices",
        "cross_entropy_statistics", "cross_entropy_logits_gradient",
    ):  # fmt: skip
        assert kernel in text, kernel


@pytest.mark.parametrize("operation", KERNELS)
def test_another_device_is_refused(operation):
    others = {"attention": "xla", "grouped_matmul": "tiles", "loss": "chunked"}
    with pytest.raises(ConfigError, match="pallas_gpu cannot do this: it needs a Hopper GPU"):
        gradients(None, **(others | {operation: "pallas_gpu"}))


def test_a_context_axis_is_refused(monkeypatch):
    monkeypatch.setattr(common, "unsupported", lambda device: None)
    with pytest.raises(ConfigError, match="not with a context axis"):
        gradients(small.on_mesh(context=2, data=4))


@pytest.fixture
def gpus(monkeypatch):
    """Compute capability, as "9.0", and number to GPUs that can be compiled for without them."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("needs NVIDIA's compilers: pip install '.[hopper]', or make test-hopper")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import gpu_compile
    from jax.experimental import topologies

    monkeypatch.setenv("PATH", str(Path(gpu_compile.ptxas()).parent), prepend=os.pathsep)

    def devices(capability: str, count: int):
        major, minor = capability.split(".")
        target = gpu_compile.TARGET.replace("major: 9 minor: 0", f"major: {major} minor: {minor}")
        return topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{count}x1"
        ).devices

    return devices


@pytest.mark.hopper
@pytest.mark.parametrize(
    ("capability", "choices"),
    [("9.0", KERNELS), ("10.0", {})],
    ids=["Hopper by name", "Blackwell by auto"],
)
def test_a_step_compiles_for_eight_gpus_that_are_not_here(gpus, capability, choices):
    sharding = Sharding.build(MeshConfig(data=2, fsdp=2, expert=2), gpus(capability, 8))
    p, batch = small.abstract(MODEL, sharding, 256)
    step = small.loss_and_gradient(MODEL, sharding, dtype="bfloat16", **choices)
    text = jax.jit(step).lower(p, batch).compile().as_text()
    assert ("mosaic_gpu" in text) == bool(choices)


@pytest.mark.hopper
def test_attention_without_a_kernel_takes_memory_that_is_linear_in_the_tokens(gpus):
    (device,) = gpus("10.0", 1)
    place = jax.sharding.SingleDeviceSharding(device)

    def temporaries(tokens: int) -> int:
        def step(q_BTNH, k_BSKH, v_BSKH, do_BTNH, positions_BT):
            mask = ops.Mask(positions_BT, positions_BT, in_order=True)
            attend = functools.partial(ops.attention, mask=mask, scale=0.1, device=device)
            return jax.vjp(attend, q_BTNH, k_BSKH, v_BSKH)[1](do_BTNH)

        arrays = [
            jax.ShapeDtypeStruct((1, tokens, heads, 128), "bfloat16", sharding=place)
            for heads in (16, 1, 1, 16)
        ]
        positions = jax.ShapeDtypeStruct((1, tokens), "int32", sharding=place)
        done = jax.jit(step).lower(*arrays, positions).compile()
        return done.memory_analysis().temp_size_in_bytes

    taken = {tokens: temporaries(tokens) for tokens in (8192, 32768)}
    print({tokens: f"{n / 2**20:.0f} MiB" for tokens, n in taken.items()})
    assert taken[32768] <= 4.2 * taken[8192]
