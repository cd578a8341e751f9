"""The nnx.Module facade: the pure functions' numbers, nnx's transformations, and Qwix on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step_jax.core import spec as spec_lib
from step_jax.core.spec import map_specs
from step_jax.interop.nnx_facade import DecoderModule
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA, MLA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens

NORM = RMSNorm()
DENSE = SwiGLU(hidden=48)
MFA_KR = MFA(heads=3, head_dim=8, value="gated_key", query_norm=NORM)
LATENT = MLA(heads=2, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8, query_rank=16)
FLOAT32 = Execution(dtype="float32")

forward = nnx.jit(lambda module, tokens_BT: module(tokens_BT))


def decoder(*attentions, repeat: int = 1, mlp=DENSE) -> Decoder:
    blocks = tuple(Block(a, mlp) for a in attentions)
    return Decoder(width=32, vocab=64, layers=(Group(repeat, blocks),))


def random_params(config: Decoder):
    rng = np.random.default_rng(0)

    def leaf(spec):
        w = rng.standard_normal(spec.shape, np.float32)
        return (
            1 + 0.1 * w if spec.role == "vector" else w / np.float32(np.sqrt(spec.matrix_shape[1]))
        )

    return map_specs(leaf, config.specs())


def random_tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 12)), jnp.int32)


# In NumPy, because every eager operation on a new shape would be a compilation.
def distance(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def all_nonzero(gradients) -> bool:
    return all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradients))


def mean_nll(logits_BTV, tokens_BT):
    """Of the next tokens, of NumPy or JAX arrays."""
    shifted = logits_BTV[:, :-1] - logits_BTV[:, :-1].max(-1, keepdims=True)
    xp = np if isinstance(logits_BTV, np.ndarray) else jnp
    chosen = xp.take_along_axis(shifted, tokens_BT[:, 1:, None], -1)[..., 0]
    return (xp.log(xp.exp(shifted).sum(-1)) - chosen).mean()


def matrices(config: Decoder) -> int:
    """How many weights the layers have."""
    return sum(spec.role == "matrix" for spec in jax.tree.leaves(config.specs().groups))


@pytest.mark.thorough
def test_equals_the_pure_functions_and_gives_the_parameters_back():
    """Packed rows too; two unlike blocks a turn, so the order of layers matters."""
    config = decoder(MFA_KR, LATENT, repeat=2)
    params, tokens_BT = random_params(config), random_tokens()
    segments_BT = jnp.broadcast_to(jnp.arange(12) // 5 + 1, (2, 12))
    positions_BT = jnp.broadcast_to(jnp.arange(12) % 5, (2, 12))

    @jax.jit
    def pure(params):
        ctx = Context(Tokens(positions_BT, segments_BT), execution=FLOAT32)
        x_BTD, *_ = config.hidden(params, tokens_BT, ctx)
        return config.logits(params, x_BTD, ctx)

    module = DecoderModule(config, params, FLOAT32)
    packed = nnx.jit(lambda m: m(tokens_BT, segments_BT, positions_BT))(module)
    np.testing.assert_allclose(packed, pure(params), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, module.params(), params)


@pytest.mark.thorough
def test_a_mixture_of_experts_gives_the_same_bits():
    """Routers in float32 choose the same experts; all else is in the dtype of every loop."""
    router = Router(2, score="sigmoid", bias=True)
    config = decoder(MFA_KR, mlp=MoE((Experts(16, 24),), router, shared=16))
    params, tokens_BT = random_params(config), random_tokens()
    execution = Execution(dtype="bfloat16")
    cast = spec_lib.cast(jax.tree.map(jnp.asarray, params), execution.dtype, config.specs())

    @jax.jit
    def pure(params):
        ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=execution)
        return config.logits(params, config.hidden(params, tokens_BT, ctx)[0], ctx)

    module = DecoderModule(config, params, execution)
    jax.tree.map(np.testing.assert_array_equal, module.params(), cast)
    kinds = {a.dtype.name for a in jax.tree.leaves(module.params())}
    assert kinds == {"bfloat16", "float32"}
    np.testing.assert_array_equal(forward(module, tokens_BT), pure(cast))


def test_split_merge_and_gradients():
    config = decoder(MFA_KR)
    module = DecoderModule(config, random_params(config), FLOAT32)
    tokens_BT = random_tokens()
    logits = forward(module, tokens_BT)

    graph, state = nnx.split(module)
    doubled = nnx.merge(graph, jax.tree.map(lambda a: 2 * np.asarray(a), state))
    assert distance(forward(doubled, tokens_BT), logits) > 0.1
    np.testing.assert_array_equal(forward(nnx.merge(graph, state), tokens_BT), logits)

    gradients = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.square(m(tokens_BT)))))(module)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)}
    assert {"embedding_VD", "layers/0/attention/reuse_CC", "layers/0/mlp/down_FD"} <= paths
    assert all_nonzero(gradients)


@pytest.mark.slow
def test_qwix_int8_weights():
    """In bfloat16, where a weight that had to be cast would no longer be known as one."""
    qwix = pytest.importorskip("qwix")
    config = decoder(MFA_KR)
    module = DecoderModule(config, random_params(config), Execution(dtype="bfloat16"))
    tokens_BT = random_tokens()
    rule = qwix.QuantizationRule(module_path="layers/.*", weight_qtype=jnp.int8)

    @nnx.jit
    def quantise(module):
        return qwix.quantize_model(module, qwix.PtqProvider([rule]), tokens_BT)

    quantised = quantise(module)
    int8 = [a for a in jax.tree.leaves(nnx.state(quantised)) if a.dtype == jnp.int8]
    assert len(int8) == matrices(config)
    change = distance(forward(quantised, tokens_BT), forward(module, tokens_BT))
    assert 1e-3 < change < 0.06


@pytest.mark.slow
def test_qwix_quantised_training_has_gradients():
    qwix = pytest.importorskip("qwix")
    config = decoder(LATENT)
    module = DecoderModule(config, random_params(config), FLOAT32)
    tokens_BT = random_tokens()
    rule = qwix.QtRule(module_path="layers/.*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    training = nnx.jit(
        lambda m: qwix.quantize_model(m, qwix.QtProvider([rule]), tokens_BT),
    )(module)

    def loss(module):
        logits_BTV = module(tokens_BT)
        return jnp.mean(jnp.square(logits_BTV)), logits_BTV

    gradients, logits_BTV = nnx.jit(nnx.grad(loss, has_aux=True))(training)
    assert 1e-3 < distance(logits_BTV, forward(module, tokens_BT)) < 0.1
    assert all_nonzero(gradients)


@pytest.mark.slow
def test_qwix_lora_trains_only_its_factors():
    qwix = pytest.importorskip("qwix")
    config = decoder(MFA_KR)
    module = DecoderModule(config, random_params(config), FLOAT32)
    tokens_BT = random_tokens()
    rule = qwix.LoraRule(module_path="layers/.*", rank=2, alpha=4.0)

    @nnx.jit
    def add_lora(module):
        provider = qwix.LoraProvider([rule])
        return qwix.apply_lora_to_model(module, provider, tokens_BT, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(module):
        def loss(module):
            return mean_nll(module(tokens_BT), tokens_BT)

        factors = nnx.DiffState(0, nnx.LoRAParam)
        value, gradients = nnx.value_and_grad(loss, argnums=factors)(module)
        old = nnx.state(module, nnx.LoRAParam)
        nnx.update(module, jax.tree.map(lambda w, g: w - 0.3 * g, old, gradients))
        return value, gradients

    adapted = add_lora(module)
    # The second factor starts at zero: nothing changes yet, and only it has a gradient.
    np.testing.assert_allclose(
        forward(adapted, tokens_BT), forward(module, tokens_BT), rtol=1e-5, atol=1e-5
    )
    losses, gradients = zip(*(step(adapted) for _ in range(3)), strict=True)
    sizes = {
        path[-1]: float(jnp.abs(g.get_value()).max()) for path, g in nnx.to_flat_state(gradients[0])
    }
    assert len(jax.tree.leaves(gradients[0])) == 2 * matrices(config)
    assert all((size > 0) == name.endswith("_lora_b") for name, size in sizes.items())
    assert all_nonzero(gradients[1])
    assert losses[0] > losses[1] > losses[2]
    jax.tree.map(np.testing.assert_array_equal, adapted.params(), module.params())
