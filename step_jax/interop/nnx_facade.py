"""A decoder as an ``nnx.Module``, for libraries that want one to hold (Qwix, Tunix, serving).

The modules own the parameters; every computation is the pure functions'. Each layer has modules
(``layers/3/attention``, ``layers/3/mlp``), so that rules can match paths and a library that
intercepts products finds the parameter it meets as an attribute of the module it is in. Layers are
therefore not scanned: compile time grows with depth here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from step_jax.core import spec as spec_lib
from step_jax.core.spec import path_name
from step_jax.models.context import Context, Execution
from step_jax.models.layers.block import Block, BlockParams
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import Stack


class Part(nnx.Module):
    """An attention or MLP kind together with its parameters, in the place of the kind alone."""

    def __init__(self, kind: Any, params: Any):
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(params)
        self.kind = kind
        self.names = tuple(path_name(path).replace("/", "_") for path, _ in leaves)
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            setattr(self, name, nnx.Param(leaf))

    def params(self):
        """The tree that the kind's own functions take."""
        return jax.tree.unflatten(self.structure, [value(getattr(self, n)) for n in self.names])

    def apply(self, _, x_BTD, ctx: Context, *cache):
        return self.kind.apply(self.params(), x_BTD, ctx, *cache)


class Layer(nnx.Module):
    """One block."""

    def __init__(self, block: Block, norm: RMSNorm, params: BlockParams):
        self.norm = norm
        self.attention_norm_D = nnx.Param(params.attention_norm_D)
        self.attention = Part(block.attention, params.attention)
        self.mlp_norm_D = nnx.Param(params.mlp_norm_D)
        self.mlp = Part(block.mlp, params.mlp)

    def params(self, attention=None, mlp=None) -> BlockParams:
        norms = value(self.attention_norm_D), value(self.mlp_norm_D)
        return BlockParams(norms[0], attention, norms[1], mlp)

    def __call__(self, x_BTD, ctx: Context):
        attention: Any = self.attention  # called like the kinds that they stand for
        mlp: Any = self.mlp
        block = Block(attention=attention, mlp=mlp)
        return block.apply(self.params(), self.norm, x_BTD, ctx)[0]


class DecoderModule(nnx.Module):
    """A decoder and its parameters, without heads of multi-token prediction.

    Qwix 0.1.8 finds every weight: ``quantize_model`` with ``PtqProvider`` and ``QtProvider``, and
    ``apply_lora_to_model`` with ``LoraProvider``, under rules like ``module_path="layers/.*"``
    (which leaves a tied embedding alone: Qwix cannot quantise what is also looked up). Qwix knows
    a weight by its identity, so weights are held in the dtype they are used in.
    """

    def __init__(self, config: Decoder, params: DecoderParams, execution: Execution | None = None):
        """Copies the layers of ``params`` out of their stacks.

        Args:
          config: the model; static.
          params: as ``config.initialise`` or ``load_hf`` give them. They are cast as every loop
            casts them (``spec.cast``), all but routers to ``execution.dtype``, so choose float32 to
            train weights or adapters.
          execution: how to compute (None: the default); ``scan`` and ``remat`` do not apply.
        """
        self.execution = Execution() if execution is None else execution
        config, params = replace(config, mtp=None), replace(params, mtp=())
        params = spec_lib.cast(
            jax.tree.map(jnp.asarray, params), self.execution.dtype, config.specs()
        )
        self.config = config
        self.embedding_VD = nnx.Param(params.embedding_VD)
        self.layers = nnx.List(
            Layer(
                stack.block,
                config.norm,
                jax.tree.map(lambda a, n=n: a[n], stack.of(params.groups)),
            )
            for stack, n in config.trunk.layers()
        )
        self.final_norm_D = nnx.Param(params.final_norm_D)
        self.head_DV = None if config.tied else nnx.Param(params.head_DV)

    def _top(self, groups=()) -> DecoderParams:
        head_DV = None if self.config.tied else value(self.head_DV)
        return DecoderParams(
            value(self.embedding_VD), groups, value(self.final_norm_D), head_DV, mtp=()
        )

    def params(self) -> DecoderParams:
        """The pure functions' parameters of ``self.config``, layers stacked again.

        LoRA factors are not part of them; weights that were quantised cannot be given back.
        """
        layers = [x.params(x.attention.params(), x.mlp.params()) for x in self.layers]

        def stacked(stack: Stack):
            same = layers[stack.first :: stack.stride][: stack.repeat]
            return jax.tree.map(lambda *a: jnp.stack(a), *same)

        return self._top(self.config.trunk.nested(stacked))

    def __call__(self, tokens_BT, segments_BT=None, positions_BT=None):
        """float32 logits (B, T, V) of int32 tokens.

        Args:
          tokens_BT: inputs.
          segments_BT: documents of packed rows (0 is padding), None when every row is one document.
          positions_BT: of tokens in their document, None for 0, 1, ... in every row.
        """
        if positions_BT is None:
            positions_BT = Tokens.in_order(*tokens_BT.shape).order_BT
        ctx = Context(Tokens(positions_BT, segments_BT), execution=self.execution)
        top = self._top()
        x_BTD = self.config.embed(top, tokens_BT, ctx)
        for layer in self.layers:
            x_BTD = layer(x_BTD, ctx)
        return self.config.logits(top, x_BTD, ctx)


class Foreign:
    """What a library put in a parameter's place (a quantised weight), as our functions see it.

    They cast every weight to the activations' dtype on its way into a product; the library, which
    intercepts that product, wants its own object there as it was.
    """

    def __init__(self, leaf: Any):
        self.leaf = leaf

    def astype(self, dtype):
        return self.leaf


def value(leaf):
    """The array of a variable, or a wrapper of what stands in its place."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else Foreign(leaf)
