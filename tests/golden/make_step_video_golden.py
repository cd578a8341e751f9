"""Makes the golden outputs that tests/models/test_video_vae.py compares with.

Command (needs `torch`, `einops` and a checkout of github.com/stepfun-ai/Step-Video-T2V, whose
`stepvideo/vae/vae.py` is run unchanged; no network, no accelerator, seconds):

    python tests/golden/make_step_video_golden.py CHECKOUT

`step_video_vae.npz` holds a clip and a latent, and what the released classes `VideoEncoder`,
`VideoDecoder` and `AutoencoderKL.mix` make of them at a small size. Weights are drawn by the names
that step_jax gives them (`weight` below), so none are stored.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "step_video_vae.npz"
LATENTS, GROUPS = 4, 32  # the released code has always 32 groups


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter of step_jax's table: of its name and shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.standard_normal(shape)
    if name.endswith("scale_C"):
        return (1 + 0.3 * value).astype(np.float32)
    if len(shape) == 1:
        return (0.3 * value).astype(np.float32)
    return (value / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def released(checkout: Path):
    """The module of the released autoencoder."""
    utils = types.ModuleType("stepvideo.utils")
    utils.with_empty_init = lambda f: f
    sys.modules |= {"stepvideo": types.ModuleType("stepvideo"), "stepvideo.utils": utils}
    spec = importlib.util.spec_from_file_location("vae", checkout / "stepvideo/vae/vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.base_group_norm.spatial = True
    return module


def our_name(name: str) -> str:
    """step_jax's name of a parameter of `VideoEncoder` or `VideoDecoder`, without its last part."""
    side, *parts = name.split(".")
    while parts[-1] == "conv":
        parts.pop()
    decoder = side == "decoder"
    heads = {
        "encoder.conv_in": "conv",
        "encoder.norm_out": "norm",
        "encoder.conv_patchify": "head/resample",
        "encoder.conv_out": "head/conv",
        "decoder.conv_in": "head/conv",
        "decoder.conv_unpatchify": "head/resample",
        "decoder.norm_out": "norm",
        "decoder.conv_out": "conv",
    }
    joined = ".".join([side, *parts])
    if joined in heads:
        return f"{side}/{heads[joined]}"
    block = {
        "norm1": "norm_in",
        "conv1": "conv_in",
        "norm2": "norm_out",
        "conv2": "conv_out",
        "nin_shortcut": "shortcut",
    }
    if parts[0] == "mid":
        if parts[1] == "attn_1":
            kind = {"q": "query", "k": "key", "v": "value", "proj_out": "out", "norm": "norm"}
            return f"{side}/middle/attention/{kind[parts[2]]}"
        return f"{side}/middle/{'before' if parts[1] == 'block_1' else 'after'}/{block[parts[2]]}"
    level = int(parts[1])
    level = 2 - level if decoder else level
    if parts[2] == "block":
        return f"{side}/levels/{level}/blocks/{parts[3]}/{block[parts[4]]}"
    inside = [p for p in parts[3:] if p not in ("conv", "conv3d")]
    resample = f"{side}/levels/{level}/resample"
    if not decoder:
        return resample
    return f"{resample}/{block[inside[0]]}" if inside else f"{resample}/conv_in"


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor of the released autoencoder, by its name there."""
    path, _, last = name.rpartition(".")
    ours = our_name(path)
    norm = "norm" in ours.split("/")[-1]
    if last == "bias":
        return weight(f"{ours}/{'bias_C' if norm else 'bias_O'}", shape)
    if norm:
        return weight(f"{ours}/scale_C", shape)
    O, I, *sides = shape  # noqa: E741
    sides = [1] * (3 - len(sides)) + sides  # a convolution of single frames
    drawn = weight(f"{ours}/weight_KKKIO", (*sides, I, O)).transpose(4, 3, 0, 1, 2)
    return np.ascontiguousarray(drawn.reshape(shape))


def fill(module, side: str) -> None:
    import torch

    for name, value in module.state_dict().items():
        value.copy_(torch.from_numpy(tensor(f"{side}.{name}", tuple(value.shape))))


def main(checkout: Path) -> None:
    import torch

    vae = released(checkout)
    sizes = {"z_channels": LATENTS, "num_res_blocks": 1, "version": 2}
    encoder = vae.VideoEncoder(ch=32, ch_mult=(1, 2, 2), down_sampling_layer=[1], **sizes)
    decoder = vae.VideoDecoder(
        ch=32, ch_mult=(1, 2, 2), temporal_up_layers=[2], temporal_downsample=2, **sizes
    )
    fill(encoder, "encoder")
    fill(decoder, "decoder")
    rng = np.random.default_rng(0)
    clip_BTHWC = rng.uniform(-1, 1, (1, 9, 16, 16, 3)).astype(np.float32)
    latent_BTHWC = rng.standard_normal((1, 3, 2, 2, LATENTS)).astype(np.float32)
    with torch.inference_mode():
        clip = torch.from_numpy(clip_BTHWC).permute(0, 4, 1, 2, 3)
        encoded = encoder(clip, clip.shape[2]).permute(0, 1, 3, 4, 2).numpy()
        decoded = decoder(torch.from_numpy(latent_BTHWC).permute(0, 1, 4, 2, 3))
        seams = torch.from_numpy(rng.uniform(-1, 1, (1, 34 + 17, 1, 2, 2)).astype(np.float32))
        before = seams.permute(0, 1, 3, 4, 2).numpy().copy()
        frames = types.SimpleNamespace(frame_len=17)
        mixed = vae.AutoencoderKL.mix(frames, seams.clone()).permute(0, 1, 3, 4, 2).numpy()
    np.savez_compressed(
        FILE,
        clip_BTHWC=clip_BTHWC,
        latent_BTHWC=latent_BTHWC,
        encoded_BTHWC=encoded,
        decoded_BTHWC=decoded.permute(0, 2, 3, 4, 1).numpy(),
        seams_BTHWC=before,
        mixed_BTHWC=mixed,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
