"""Makes the golden outputs that tests/interop/test_step_video.py compares with.

Command (needs `torch`, `einops` and checkouts of github.com/stepfun-ai/Step-Video-T2V and
Step-Video-TI2V, whose `stepvideo/modules` are run unchanged; no network, no accelerator, seconds):

    python tests/golden/make_step_video_dit_golden.py T2V_CHECKOUT TI2V_CHECKOUT

`step_video_dit.npz` holds, of both forms of the released class `StepVideoModel`: what it makes of
latents, texts and times at a small size, in float32, and the names and shapes of its tensors at
full size, made on the device `meta`, which holds no numbers. So does it of the full-size
`AutoencoderKL`. Weights are drawn by their names (`weight` below), so none are stored.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "step_video_dit.npz"
SMALL = {
    "num_attention_heads": 1, "in_channels": 3, "out_channels": 3, "num_layers": 2,
    "caption_channels": [5, 6], "attention_type": "torch",
}  # fmt: skip
SIZE = (2, 2, 3)  # frames, height, width
LENGTHS = (2, 4)  # tokens of the two texts, of 4
CLIP_TOKENS, LLM_TOKENS = 3, 4
MOTION = 5.0


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor: of its name and shape alone."""
    value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return (1 + 0.3 * value).astype(np.float32)
    if len(shape) == 1:
        return (0.3 * value).astype(np.float32)
    return (value / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def released(checkout: Path):
    """The module of the released transformer; what it takes of other libraries is bookkeeping."""
    for name in [n for n in sys.modules if n.split(".")[0] == "stepvideo"]:
        del sys.modules[name]
    package = types.ModuleType("stepvideo")
    package.__path__ = [str(checkout / "stepvideo")]
    utils = types.ModuleType("stepvideo.utils")
    utils.with_empty_init = lambda f: f
    parallel = types.ModuleType("stepvideo.parallel")
    parallel.parallel_forward = lambda f: f
    parallel.get_sequence_parallel_world_size = lambda: 1
    parallel.get_sequence_parallel_rank = lambda: 0
    sys.modules |= {"stepvideo": package, "stepvideo.utils": utils, "stepvideo.parallel": parallel}
    xfuser = "xfuser.model_executor.models.customized.step_video_t2v"
    parts = xfuser.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:i])] = types.ModuleType(parts[i - 1])
    for part in ("blocks", "normalization"):  # copies, of the same names, for tensor parallelism
        sys.modules[f"{xfuser}.{part}"] = importlib.import_module(f"stepvideo.modules.{part}")
    diffusers(sys.modules)
    return importlib.import_module("stepvideo.modules.model")


def diffusers(modules) -> None:
    """Its two base classes and the decorator that keeps a constructor's arguments."""
    import inspect

    from torch import nn

    def register(init):
        signature = inspect.signature(init)

        def wrapped(self, **arguments):
            bound = signature.bind(self, **arguments)
            bound.apply_defaults()
            own = {k: v for k, v in bound.arguments.items() if k != "self"}
            object.__setattr__(self, "config", types.SimpleNamespace(**own))
            init(self, **arguments)

        return wrapped

    root, configuration = types.ModuleType("diffusers"), types.ModuleType("configuration_utils")
    models, utils = types.ModuleType("models"), types.ModuleType("modeling_utils")
    configuration.ConfigMixin = type("ConfigMixin", (), {})
    configuration.register_to_config = register
    utils.ModelMixin = nn.Module
    modules |= {
        "diffusers": root,
        "diffusers.configuration_utils": configuration,
        "diffusers.models": models,
        "diffusers.models.modeling_utils": utils,
    }


def inputs(pictures: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(pictures)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    F, H, W = SIZE
    llm, clip = SMALL["caption_channels"]
    drawn = {
        "latents_BFCHW": normal(2, F, SMALL["in_channels"], H, W),
        "llm_BSE": normal(2, LLM_TOKENS, llm),
        "clip_BSE": normal(2, CLIP_TOKENS, clip),
        # angles of 1000 t are of float32 there: at 0.9 their rounding alone is 1e-5 of the output
        "time_B": np.array([0.3, 0.05], np.float32),
    }
    if pictures:
        first = np.zeros_like(drawn["latents_BFCHW"])
        first[:, 0] = normal(2, SMALL["in_channels"], H, W)
        drawn["first_BFCHW"] = first
    return drawn


def output(module, pictures: bool, given: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    model = module.StepVideoModel(**SMALL, use_additional_conditions=pictures)
    for name, value in model.state_dict().items():
        value.copy_(torch.from_numpy(weight(name, tuple(value.shape))))
    t = {name: torch.from_numpy(a) for name, a in given.items()}
    lengths = CLIP_TOKENS + torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(CLIP_TOKENS + LLM_TOKENS) < lengths).int()
    extra = {}
    if pictures:
        extra = {"condition_hidden_states": t["first_BFCHW"], "motion_score": MOTION}
    return model(
        t["latents_BFCHW"],
        encoder_hidden_states=t["llm_BSE"],
        encoder_hidden_states_2=t["clip_BSE"],
        timestep=t["time_B"],
        encoder_attention_mask=mask,
        return_dict=False,
        **extra,
    ).numpy()


def shapes(module, name: str = "StepVideoModel", **options) -> str:
    """JSON of a full-size model's tensors."""
    import torch

    with torch.device("meta"):
        state = getattr(module, name)(**options).state_dict()
    return json.dumps({name: list(value.shape) for name, value in state.items()})


def main(text: Path, pictures: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.golden.make_step_video_golden import released as released_vae

    held = {}
    for form, checkout in (("t2v", text), ("ti2v", pictures)):
        module, given = released(checkout), inputs(form == "ti2v")
        held |= {f"{form}/{name}": a for name, a in given.items()}
        held[f"{form}/output_BFCHW"] = output(module, form == "ti2v", given)
        held[f"{form}/shapes"] = shapes(module, use_additional_conditions=form == "ti2v")
    vae = shapes(released_vae(text), "AutoencoderKL", z_channels=64, version=2)
    held["vae/shapes"] = vae
    np.savez_compressed(FILE, **held)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
