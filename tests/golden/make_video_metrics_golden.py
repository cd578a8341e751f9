"""Makes the golden figures that tests/evaluation/test_video.py compares with.

Command (needs `torch`, `lpips` and `scikit-image`; no network, no accelerator, seconds):

    python tests/golden/make_video_metrics_golden.py

`video_metrics.npz` holds two clips and what scikit-image (PSNR, SSIM) and the package lpips say of
them. LPIPS's networks are torchvision's, restated here in its layers, with weights drawn by name
(`weight` of make_step_video_golden), so none are stored.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from make_step_video_golden import weight  # noqa: E402

FILE = Path(__file__).parent / "video_metrics.npz"
CONVS = {
    "alexnet": [(64, 11, 4, 2), "P", (192, 5, 1, 2), "P", (384, 3, 1, 1), (256, 3, 1, 1)]
    + [(256, 3, 1, 1), "P"],
    "vgg16": [
        *[(64, 3, 1, 1)] * 2, "P", *[(128, 3, 1, 1)] * 2, "P", *[(256, 3, 1, 1)] * 3, "P",
        *[(512, 3, 1, 1)] * 3, "P", *[(512, 3, 1, 1)] * 3, "P",
    ],
}  # fmt: skip
TITLES = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}


def linear(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """LPIPS's linear weights are positive."""
    return np.abs(weight(name, shape))


def features(network: str):
    """torchvision's `features` of a network."""
    import torch

    layers, inputs, number = [], 3, 0
    for item in CONVS[network]:
        if item == "P":
            layers.append(torch.nn.MaxPool2d(3 if network == "alexnet" else 2, 2))
            continue
        outputs, side, stride, padding = item
        conv = torch.nn.Conv2d(inputs, outputs, side, stride, padding)
        name = f"{TITLES[network]}/Conv_{number}"
        kernel = weight(f"{name}/kernel", (side, side, inputs, outputs)).transpose(3, 2, 0, 1)
        conv.weight.data.copy_(torch.from_numpy(kernel.copy()))
        conv.bias.data.copy_(torch.from_numpy(weight(f"{name}/bias", (outputs,))))
        layers += [conv, torch.nn.ReLU(inplace=True)]
        inputs, number = outputs, number + 1
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def distances(network: str, a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
    """What the package lpips says, with our weights in it."""
    import torch

    models = types.SimpleNamespace(
        alexnet=lambda **_: features("alexnet"), vgg16=lambda **_: features("vgg16")
    )
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision"].models = models
    sys.modules["torchvision.models"] = models
    import lpips

    short = {"alexnet": "alex", "vgg16": "vgg"}[network]
    judge = lpips.LPIPS(net=short, pretrained=False, pnet_rand=True, verbose=False).eval()
    for i, layer in enumerate(judge.lins):
        conv = layer.model[-1]
        shape = (1, 1, conv.weight.shape[1], 1)
        drawn = linear(f"NetLinLayer_{i}/Conv_0/kernel", shape).transpose(3, 2, 0, 1)
        conv.weight.data.copy_(torch.from_numpy(drawn.copy()))
    with torch.inference_mode():
        pair = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a_NHWC, b_NHWC)]
        return judge(*pair).numpy().ravel()


def main() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (3, 6, 5, 3)).repeat(8, 1).repeat(8, 2).astype(np.float32)
    b = np.clip(a + rng.normal(0, 0.2, a.shape), -1, 1).astype(np.float32)
    similar = [
        structural_similarity(
            x, y, data_range=2.0, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]  # fmt: skip
    np.savez_compressed(
        FILE,
        a_THWC=a,
        b_THWC=b,
        psnr=peak_signal_noise_ratio(a, b, data_range=2.0),
        ssim=np.mean(similar),
        alexnet=distances("alexnet", a, b),
        vgg16=distances("vgg16", a, b),
    )


if __name__ == "__main__":
    main()
