"""The video autoencoder of Step-Video-T2V (arXiv 2502.10248, section 4.1): 8 x 16 x 16 smaller.

A clip is cut into chunks of 17 frames, each of which becomes 3 frames of latents by itself. A
picture is a clip of one frame. Within a chunk everything is causal.

Shape suffixes: B clips, T frames, t frames of latents, H height, W width, h and w those of latents,
C channels of a clip, Z channels of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.fsdp import gathered
from step_jax.core.sharding import Sharding
from step_jax.models.layers.convolution import (
    Carry,
    CausalConv,
    ConvParams,
    NormParams,
    norm_specs,
    spatial_group_norm,
)
from step_jax.models.video.vae_layers import (
    BLOCK,
    FACTOR,
    DownHead,
    Downsample,
    Head,
    HeadParams,
    PlaceAttention,
    ResBlock,
    UpHead,
    Upsample,
)

LOGVAR_BOUNDS = (-30.0, 20.0)
SEAM = 0.6  # of a frame at the border of two chunks; the rest is of its neighbour


@struct.dataclass
class LevelParams:
    blocks: tuple[Any, ...]  # ResBlockParams
    resample: Any  # ConvParams or UpsampleParams, None at the last level


@struct.dataclass
class MiddleParams:
    before: Any  # ResBlockParams
    attention: Any  # PlaceAttentionParams, or None
    after: Any


@struct.dataclass
class EncoderParams:
    conv: ConvParams
    levels: tuple[LevelParams, ...]
    middle: MiddleParams
    norm: NormParams
    head: HeadParams


@struct.dataclass
class DecoderParams:
    head: HeadParams
    middle: MiddleParams
    levels: tuple[LevelParams, ...]  # from the smallest picture to the largest
    norm: NormParams
    conv: ConvParams


@struct.dataclass
class VideoVAEParams:
    encoder: EncoderParams
    decoder: DecoderParams


@dataclass(frozen=True)
class VideoVAE:
    """Causal convolutions of several levels, a middle with attention, and a head.

    latents: channels of a latent.
    stem: channels of the encoder's first convolution.
    encoder_widths, decoder_widths: channels of each level, from the largest picture on.
    encoder_blocks, decoder_blocks: residual blocks of a level.
    temporal: for each step from a level to the next, whether it halves the time beside height and
      width.
    head: how time, height and width are halved once more: ``dual_path``, its convolutions alone
      (``plain``), or not at all (``none``, of the first stage of training).
    head_width: channels within the head; 0 for the report's 32 times the latents'.
    attention: whether the middle has it.
    groups: of the norms.
    chunk: frames that are coded together.
    channels: of a clip.
    """

    kind: ClassVar[str] = "video_vae"
    latents: int = 64
    stem: int = 32
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    temporal: tuple[bool, ...] = (False, True, True)
    head: Head = "dual_path"
    head_width: int = 0
    attention: bool = True
    groups: int = 32
    chunk: int = 17
    channels: int = 3

    def validate(self):
        checks.at_least(
            self, latents=1, stem=1, encoder_blocks=1, decoder_blocks=1, groups=1, channels=1,
            head_width=0, chunk=1,
        )  # fmt: skip
        levels = len(self.temporal) + 1
        if not len(self.encoder_widths) == len(self.decoder_widths) == levels:
            raise ConfigError(
                f"encoder_widths {self.encoder_widths} and decoder_widths {self.decoder_widths} "
                f"must have {levels} levels, one more than temporal {self.temporal}"
            )
        if bad := [w for w in (*self.encoder_widths, *self.decoder_widths) if w % self.groups]:
            raise ConfigError(f"widths {bad} are no multiples of the {self.groups} groups")
        if (self.chunk - 1) % self.reduction[0]:
            raise ConfigError(
                f"chunk is {self.chunk}; it must be 1 more than a multiple of "
                f"{self.reduction[0]}, by which time is reduced"
            )
        self._check_head()

    def _check_head(self):
        if self.head == "none":
            return
        inner, outer = self.encoder_widths[-1] * BLOCK, self.decoder_widths[-1] * BLOCK
        W = self._head_width
        if W % BLOCK or (self.head == "dual_path" and (
            W % (2 * self.latents) or inner % W or outer % W
        )):  # fmt: skip
            raise ConfigError(
                f"head_width {W} must be a multiple of {BLOCK} and, for dual_path, of "
                f"{2 * self.latents} (twice the latents), and divide {inner} and {outer} ({BLOCK} "
                "times the last widths)"
            )

    @property
    def _head_width(self) -> int:
        return self.head_width or 4 * BLOCK * self.latents

    @property
    def reduction(self) -> tuple[int, int, int]:
        """By how much time, height and width are reduced: (8, 16, 16) of the report's."""
        head = 1 if self.head == "none" else FACTOR
        side = 2 ** len(self.temporal) * head
        return 2 ** sum(self.temporal) * head, side, side

    @property
    def chunk_latents(self) -> int:
        """Frames of latents of a chunk."""
        return 1 + (self.chunk - 1) // self.reduction[0]

    def latent_frames(self, frames: int) -> int:
        """Frames of latents of a clip of so many frames."""
        chunks, rest = divmod(frames, self.chunk)
        return chunks * self.chunk_latents + (
            -(-(rest - 1) // self.reduction[0]) + 1 if rest else 0
        )

    def frames(self, latent_frames: int) -> int:
        """The most frames that so many frames of latents are of."""
        chunks, rest = divmod(latent_frames, self.chunk_latents)
        return chunks * self.chunk + (1 + (rest - 1) * self.reduction[0] if rest else 0)

    def specs(self) -> VideoVAEParams:
        """The parameter table."""
        return VideoVAEParams(self._encoder_specs(), self._decoder_specs())

    def initialise(self, key) -> VideoVAEParams:
        """Fresh float32 parameters."""
        return spec_lib.init(self.specs(), key)

    # --- layers ----------------------------------------------------------------------------------

    @property
    def _stem(self) -> CausalConv:
        return CausalConv(self.channels, self.stem)

    def _blocks(self, inputs: int, outputs: int, count: int) -> list[ResBlock]:
        return [ResBlock(n, outputs, self.groups) for n in (inputs, *[outputs] * (count - 1))]

    def _encoder_levels(self) -> list[tuple[list[ResBlock], Downsample | None]]:
        inputs = (self.stem, *self.encoder_widths)
        return [
            (
                self._blocks(n, width, self.encoder_blocks),
                Downsample(width, self.temporal[i]) if i < len(self.temporal) else None,
            )
            for i, (n, width) in enumerate(zip(inputs, self.encoder_widths, strict=False))
        ]

    def _decoder_levels(self) -> list[tuple[list[ResBlock], Upsample | None]]:
        widths, levels = self.decoder_widths, []
        for i in reversed(range(len(widths))):
            inputs = widths[min(i + 1, len(widths) - 1)]
            up = Upsample(widths[i], self.temporal[i - 1], self.groups) if i else None
            levels.append((self._blocks(inputs, widths[i], self.decoder_blocks), up))
        return levels

    def _middle(self, width: int) -> tuple[ResBlock, PlaceAttention]:
        return ResBlock(width, width, self.groups), PlaceAttention(width, self.groups)

    def _down_head(self) -> DownHead:
        return DownHead(self.head, self.encoder_widths[-1], self._head_width, 2 * self.latents)

    def _up_head(self) -> UpHead:
        return UpHead(self.head, self.latents, self._head_width, self.decoder_widths[-1])

    def _middle_specs(self, width: int) -> MiddleParams:
        block, attention = self._middle(width)
        return MiddleParams(
            block.specs(), attention.specs() if self.attention else None, block.specs()
        )

    def _encoder_specs(self) -> EncoderParams:
        return EncoderParams(
            conv=self._stem.specs(),
            levels=_level_specs(self._encoder_levels()),
            middle=self._middle_specs(self.encoder_widths[-1]),
            norm=norm_specs(self.encoder_widths[-1]),
            head=self._down_head().specs(),
        )

    def _decoder_specs(self) -> DecoderParams:
        return DecoderParams(
            head=self._up_head().specs(),
            middle=self._middle_specs(self.decoder_widths[-1]),
            levels=_level_specs(self._decoder_levels()),
            norm=norm_specs(self.decoder_widths[0]),
            conv=CausalConv(self.decoder_widths[0], self.channels).specs(),
        )

    # --- one chunk, or a piece of one ------------------------------------------------------------

    def encode_piece(self, p: EncoderParams, x_BTHWC, carry: Carry):
        """(mean, logarithm of the variance) of a chunk's frames, or of a piece of them."""
        x = self._stem.apply(p.conv, x_BTHWC, carry)
        x = _through_levels(self._encoder_levels(), p.levels, x, carry)
        x = self._through_middle(p.middle, x, carry)
        x = jax.nn.silu(spatial_group_norm(p.norm, x, self.groups))
        x = self._down_head().apply(p.head, x, carry).astype(jnp.float32)
        mean_BthwZ, logvar_BthwZ = jnp.split(x, 2, -1)
        return mean_BthwZ, jnp.clip(logvar_BthwZ, *LOGVAR_BOUNDS)

    def decode_piece(self, p: DecoderParams, z_BthwZ, carry: Carry):
        """The frames of a chunk's latents, or of a piece of them; float32, not clipped."""
        x = self._up_head().apply(p.head, z_BthwZ, carry)
        x = self._through_middle(p.middle, x, carry)
        x = _through_levels(self._decoder_levels(), p.levels, x, carry)
        x = jax.nn.silu(spatial_group_norm(p.norm, x, self.groups))
        conv = CausalConv(self.decoder_widths[0], self.channels)
        x_BTHWC = conv.apply(p.conv, x, carry).astype(jnp.float32)
        # a clip's first frame has been doubled along with the others
        return x_BTHWC[:, 2 ** sum(self.temporal) - 1 :] if carry.first else x_BTHWC

    def _through_middle(self, p: MiddleParams, x, carry: Carry):
        block, attention = self._middle(x.shape[-1])
        x = block.apply(p.before, x, carry)
        if self.attention:
            x = attention.apply(p.attention, x, carry)
        return block.apply(p.after, x, carry)

    # --- clips -----------------------------------------------------------------------------------

    def encode(self, params: VideoVAEParams, video_BTHWC, sharding: Sharding | None = None):
        """The distribution of a clip's latents: mean and logarithm of the variance.

        The parameters' dtype is what is computed in. Chunks are independent; of the last one, what
        is missing is filled up with its last frame (to the next size that the decoder gives back).

        Args:
          video_BTHWC: in [-1, 1]; height and width are multiples of the reduction.

        Returns:
          two float32 arrays (B, t, h, w, Z), t as ``latent_frames`` says.

        Raises:
          ConfigError: sizes that the reduction does not divide.
        """
        T, H, W = video_BTHWC.shape[1:4]
        self.check_size(T, H, W)
        p = self._whole(params, sharding).encoder
        x_BTHWC = video_BTHWC.astype(p.conv.weight_KKKIO.dtype)
        parts = self._by_chunk(
            lambda x: self.encode_piece(p, x, Carry()), self._filled(x_BTHWC), self.chunk
        )
        mean, logvar = (jnp.concatenate(part, 1) for part in zip(*parts, strict=True))
        return mean, logvar

    def decode(
        self,
        params: VideoVAEParams,
        latents_BthwZ,
        frames: int | None = None,
        sharding: Sharding | None = None,
    ):
        """The clip of latents: float32 (B, T, H, W, C), not clipped, seams of chunks blended.

        Args:
          frames: of the clip, if it is shorter than its latents allow.
        """
        p = self._whole(params, sharding).decoder
        z_BthwZ = latents_BthwZ.astype(p.conv.weight_KKKIO.dtype)
        parts = self._by_chunk(
            lambda z: self.decode_piece(p, z, Carry()), z_BthwZ, self.chunk_latents
        )
        return self.blended(jnp.concatenate(parts, 1))[:, :frames]

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raises ConfigError for a clip that cannot be encoded."""
        side = self.reduction[1]
        if frames < 1 or height % side or width % side or not height or not width:
            raise ConfigError(
                f"a clip of {frames} frames of {height} x {width} cannot be encoded: it needs a "
                f"frame, and height and width must be multiples of {side}"
            )

    def blended(self, video_BTHWC):
        """The two frames at each border of chunks mixed, first the later with the earlier, then the
        earlier with what the later has become, as the released model does it."""
        T, n = video_BTHWC.shape[1], self.chunk
        front, back = slice(n - 1, T - 1, n), slice(n, T, n)
        if T <= n:
            return video_BTHWC
        video_BTHWC = jnp.asarray(video_BTHWC)
        later = SEAM * video_BTHWC[:, back] + (1 - SEAM) * video_BTHWC[:, front]
        earlier = SEAM * video_BTHWC[:, front] + (1 - SEAM) * later
        return video_BTHWC.at[:, back].set(later).at[:, front].set(earlier)

    def _filled(self, x_BTHWC):
        missing = self.frames(self.latent_frames(x_BTHWC.shape[1])) - x_BTHWC.shape[1]
        if not missing:
            return x_BTHWC
        return jnp.concatenate([x_BTHWC, jnp.repeat(x_BTHWC[:, -1:], missing, 1)], 1)

    def _by_chunk(self, f, x_BTHWC, size: int) -> list:
        """``f`` of each chunk; whole chunks are computed as more rows of one batch."""
        B, T, *rest = x_BTHWC.shape
        whole = T // size
        parts = []
        if whole:
            rows = f(x_BTHWC[:, : whole * size].reshape(B * whole, size, *rest))
            parts.append(
                jax.tree.map(lambda y: y.reshape(B, whole * y.shape[1], *y.shape[2:]), rows)
            )
        if T % size:
            parts.append(f(x_BTHWC[:, whole * size :]))
        return parts

    def _whole(self, params, sharding: Sharding | None):
        """The parameters with FSDP undone."""
        if sharding is None:
            return params
        return spec_lib.map_specs(lambda s, w: gathered(w, s.axes, sharding), self.specs(), params)


def _level_specs(levels) -> tuple[LevelParams, ...]:
    return tuple(
        LevelParams(tuple(b.specs() for b in blocks), resample.specs() if resample else None)
        for blocks, resample in levels
    )


def _through_levels(levels, params: tuple[LevelParams, ...], x, carry: Carry):
    for (blocks, resample), p in zip(levels, params, strict=True):
        for block, own in zip(blocks, p.blocks, strict=True):
            x = block.apply(own, x, carry)
        if resample is not None:
            x = resample.apply(p.resample, x, carry)
    return x
