"""Devices that are not there, as far as the choice of an implementation looks at them."""

from types import SimpleNamespace

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")


def _gpu(kind: str, capability: str) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


AMPERE = _gpu("NVIDIA A100-SXM4-80GB", "8.0")
HOPPER = _gpu("NVIDIA H100 80GB HBM3", "9.0")
BLACKWELL = _gpu("NVIDIA B200", "10.0")
