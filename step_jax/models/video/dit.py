"""The text-conditioned diffusion transformer of Step-Video (arXiv 2502.10248), of any size.

A row of tokens is one clip's latents in patches, or a pack of several samples that do not see each
other, each with its own time, text and conditions. A picture is a clip of one frame.

Shape suffixes: B rows, T tokens, P numbers in a patch, A axes of a place, G samples of a row, S
tokens of a text, E width of an encoder, D model width, K extra conditions, M rows of a table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as specs_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.cross_attention import CrossAttention
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.mlp import GELU, SwiGLU
from step_jax.models.layers.norm import LayerNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import Group, Trunk, gather
from step_jax.models.video.dit_block import Condition, ModulatedBlock
from step_jax.models.video.patches import Sizes
from step_jax.models.video.text_inputs import TextInput
from step_jax.ops.attention import Mask
from step_jax.ops.einsum import einsum
from step_jax.ops.norm import layer_norm

EPS = 1e-6
NORM = LayerNorm(1e-5)  # of the layers
WAVES = 256  # sinusoids of a time

Scalar = Literal["frames", "height", "width", "fps", "motion"]


@struct.dataclass
class Rows:
    """What the model is told of rows of patches besides the patches.

    Attributes:
      place_BTA: (time, row, column) of every patch, int32.
      segments_BT: int32, 1 + the number of a token's sample in its row, 0 for padding; None where
        every row is one whole sample.
      text: of each of the model's text inputs, states (B, G, S, E) or int32 tokens (B, G, S).
      lengths: of each input, tokens of the samples' texts, int32 (B, G); 0 shows none.
      scalars_BGK: the model's extra conditions, float32; None for a model without.
      first_BTP: the first frame's latents as patches, zeros in other frames; None for a model that
        does not continue pictures.
    """

    place_BTA: jax.Array
    segments_BT: jax.Array | None = None
    text: tuple[jax.Array, ...] = ()
    lengths: tuple[jax.Array, ...] = ()
    scalars_BGK: jax.Array | None = None
    first_BTP: jax.Array | None = None


@struct.dataclass
class EmbedderParams:
    in_WD: Any
    in_bias_D: Any
    out_DD: Any
    out_bias_D: Any


@struct.dataclass
class VideoDiTParams:
    patch_PD: Any
    patch_bias_D: Any
    time: EmbedderParams
    scalars: tuple[EmbedderParams, ...]
    modulation_DMD: Any
    modulation_bias_MD: Any
    text: tuple[Any, ...]
    blocks: Any  # ModulatedBlockParams, stacked
    final_MD: Any
    head_DP: Any
    head_bias_P: Any


@dataclass(frozen=True)
class VideoDiT:
    """Full attention over time and space, and attention over a text's states.

    attention: of the tokens; its ``position`` rotates by (time, row, column).
    channels: of a latent.
    deviation: of the latents' numbers, which the model works with divided by it. Data that
      deviate by far from 1 are hidden by noise at other times than the flow's settings are made
      for.
    patch: of latents, along time, height and width.
    text: what is read of a text, in the order of its states.
    scalars: extra conditions, each a number of a sample: frames, height and width of its latents,
      frames per second, a score of its motion.
    first_frame: the model continues pictures: latents of the first frame stand beside the noisy
      ones along the channels (arXiv 2503.11251).
    unit_gates: the gates of a layer's branches are 1 + g of what the tables hold. The released
      Step-Video's are g; of small ones, g - 1 would leave bfloat16 few digits.
    prediction: what comes out: the velocity, or the data, of which the velocity follows. At few
      dimensions per patch the data are learnt far sooner (arXiv 2511.13720).
    """

    kind: ClassVar[str] = "video_dit"
    width: int
    depth: int
    attention: MHA
    mlp: GELU | SwiGLU
    channels: int
    deviation: float = 1.0
    patch: Sizes = (1, 1, 1)
    text: tuple[TextInput, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    first_frame: bool = False
    unit_gates: bool = True
    prediction: Literal["velocity", "data"] = "velocity"
    init: Initialisation = field(default_factory=FanIn)

    def validate(self):
        checks.at_least(self, width=1, depth=1, channels=1)
        checks.above(self, deviation=0)
        if min(self.patch) < 1:
            raise ConfigError(f"the patch is {self.patch}; each side must be at least 1")
        for what, names in (("text", [t.name for t in self.text]), ("scalars", self.scalars)):
            if len(set(names)) < len(names):
                raise ConfigError(f"{what} has a name twice: {', '.join(names)}")
        if self.attention.window is not None:
            raise ConfigError("the attention of a diffusion transformer has no window")
        position = self.attention.position
        if position is not None and not (isinstance(position, Rope) and len(position.axes) == 3):
            raise ConfigError(
                "attention.position is null or rotates by (time, row, column): {kind: rope, axes: "
                "[64, 32, 32]}, say, of heads of 128"
            )

    @property
    def numbers(self) -> int:
        """In a patch."""
        return self.channels * math.prod(self.patch)

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The layers, all of one stack."""
        a = self.attention
        cross = CrossAttention(a.heads, a.head_dim, a.qk_norm) if self.text else None
        group = Group(self.depth, (ModulatedBlock(a, self.mlp, cross, self.unit_gates),))
        return Trunk(self.width, (group,), NORM, self.init)

    def specs(self) -> VideoDiTParams:
        """The parameter table."""
        D, P, init = self.width, self.numbers, self.init
        read = P * (2 if self.first_frame else 1)
        return VideoDiTParams(
            patch_PD=ParamSpec((read, D), (None, "embed"), init.matrix(read)),
            patch_bias_D=_vector(D),
            time=_embedder(D, init),
            scalars=tuple(_embedder(D, init) for _ in self.scalars),
            modulation_DMD=ParamSpec((D, 6, D), ("embed", None, None), ZEROS),
            modulation_bias_MD=_vector(6, D),
            text=tuple(t.specs(D, init) for t in self.text),
            blocks=self.trunk.specs()[0][0],
            final_MD=_vector(2, D),
            head_DP=ParamSpec((D, P), ("embed", None), init.head(D), role="head"),
            head_bias_P=_vector(P),
        )

    def initialise(self, key) -> VideoDiTParams:
        """Fresh float32 parameters."""
        return specs_lib.init(self.specs(), key, lambda name: (0, 1))

    def apply(
        self,
        p: VideoDiTParams,
        x_BTP,
        time_BG,
        rows: Rows,
        execution: Execution,
        sharding: Sharding | None = None,
    ):
        """What the model predicts for every number of a patch: float32 (B, T, P).

        Args:
          x_BTP: noisy patches, any float dtype.
          time_BG: of each sample, float32 in [0, 1]: 0 is noise, 1 is data.
        """
        B, T, _ = x_BTP.shape
        tokens = Tokens.in_order(B, T, causal=False)
        tokens = replace(tokens, segments_BT=rows.segments_BT, place_BTA=rows.place_BTA)
        ctx = Context(tokens, sharding=sharding, execution=execution)
        blocks, specs = p.blocks, replace(self.specs(), blocks=None)
        p = gather(specs, replace(p, blocks=None), ctx)
        dtype = execution.dtype
        if self.first_frame:
            assert rows.first_BTP is not None
            x_BTP = jnp.concatenate([x_BTP, rows.first_BTP.astype(x_BTP.dtype)], -1)
        x_BTD = einsum("BTP,PD->BTD", x_BTP.astype(dtype), p.patch_PD)
        x_BTD = ctx.constrain(x_BTD + p.patch_bias_D.astype(dtype), "batch", "sequence", None)
        time_BGD = self._time(p, time_BG, rows, dtype)
        condition = self._condition(p, time_BGD, rows, ctx)
        x_BTD, *_ = self.trunk.apply(((blocks,),), x_BTD, ctx, condition=condition)
        table_BGMD = time_BGD[:, :, None] + p.final_MD.astype(dtype)
        shift, scale = condition.of_tokens(table_BGMD)
        x_BTD = layer_norm(x_BTD, None, None, EPS) * (1 + scale) + shift
        out_BTP = einsum("BTD,DP->BTP", x_BTD, p.head_DP).astype(jnp.float32)
        return out_BTP + p.head_bias_P.astype(jnp.float32)

    def _time(self, p: VideoDiTParams, time_BG, rows: Rows, dtype):
        """(B, G, D): the embeddings of ``1000 t`` and of the extra conditions, added."""
        embedded_BGD = _embed(p.time, 1000.0 * time_BG.astype(jnp.float32), dtype)
        for k, embedder in enumerate(p.scalars):
            assert rows.scalars_BGK is not None
            embedded_BGD += _embed(embedder, rows.scalars_BGK[..., k], dtype)
        return embedded_BGD

    def _condition(self, p: VideoDiTParams, time_BGD, rows: Rows, ctx: Context) -> Condition:
        modulation_BGMD = einsum("BGD,DME->BGME", jax.nn.silu(time_BGD), p.modulation_DMD)
        modulation_BGMD += p.modulation_bias_MD.astype(time_BGD.dtype)
        G, segments_BT = time_BGD.shape[1], rows.segments_BT
        sample_BTG = None
        if segments_BT is not None:
            sample_BTG = jax.nn.one_hot(segments_BT - 1, G, dtype=time_BGD.dtype)
            sample_BTG = ctx.constrain(sample_BTG, "batch", "sequence", None)
        if not self.text:
            return Condition(modulation_BGMD, sample_BTG)
        text_BSD, of_BS = self._text(p, rows, ctx, G)
        if segments_BT is None:
            segments_BT = jnp.ones_like(ctx.tokens.order_BT)
        places = jnp.zeros_like(segments_BT), jnp.zeros_like(of_BS)  # of no matter: no causality
        mask = Mask(*places, segments_BT, of_BS, causal=False)
        return Condition(modulation_BGMD, sample_BTG, text_BSD, mask)

    def _text(self, p: VideoDiTParams, rows: Rows, ctx: Context, G: int):
        """(states (B, S, D) of the texts of all samples, 1 + the sample of each, 0 if unseen)."""
        whole = None if ctx.sharding is None else ctx.sharding.of_whole_sequences()
        ctx = replace(ctx, sharding=whole)
        states, seen = [], []
        for kind, own, given, lengths_BG in zip(
            self.text, p.text, rows.text, rows.lengths, strict=True
        ):
            B = given.shape[0]
            texts = given.reshape(B * G, *given.shape[2:])
            x_RSD, lengths_R = kind.apply(own, texts, lengths_BG.reshape(B * G), ctx)
            states.append(x_RSD.reshape(B, G, *x_RSD.shape[1:]))
            # a text of no tokens (there is none) shows nothing, its padding neither
            lengths_BG = jnp.where(lengths_BG > 0, lengths_R.reshape(B, G), 0)
            seen.append(jnp.arange(x_RSD.shape[1]) < lengths_BG[..., None])
        states_BGSD, seen_BGS = jnp.concatenate(states, 2), jnp.concatenate(seen, 2)
        of_BGS = jnp.where(seen_BGS, 1 + jnp.arange(G, dtype=jnp.int32)[:, None], 0)
        B, _, S, D = states_BGSD.shape
        return states_BGSD.reshape(B, G * S, D), of_BGS.reshape(B, G * S)


def _vector(*shape: int) -> ParamSpec:
    return ParamSpec(shape, (None,) * len(shape), ZEROS, role="vector")


def _embedder(width: int, init: Initialisation) -> EmbedderParams:
    return EmbedderParams(
        in_WD=ParamSpec((WAVES, width), (None, "embed"), init.matrix(WAVES)),
        in_bias_D=_vector(width),
        out_DD=ParamSpec((width, width), ("embed", None), init.matrix(width)),
        out_bias_D=_vector(width),
    )


def waves(number_BG):
    """(B, G, WAVES): cosines, then sines, of frequencies from 1 to 1/10,000, float32."""
    half = WAVES // 2
    frequency_W = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BGW = number_BG.astype(jnp.float32)[..., None] * frequency_W
    return jnp.concatenate([jnp.cos(angle_BGW), jnp.sin(angle_BGW)], -1)


def _embed(p: EmbedderParams, number_BG, dtype):
    x_BGW = waves(number_BG).astype(dtype)
    x_BGD = jax.nn.silu(einsum("BGW,WD->BGD", x_BGW, p.in_WD) + p.in_bias_D.astype(dtype))
    return einsum("BGD,DC->BGC", x_BGD, p.out_DD) + p.out_bias_D.astype(dtype)
