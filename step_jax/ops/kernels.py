"""What operations with several implementations share: one is named, or there is a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pallas_kernels.gpu import common as gpu
from step_jax.core.errors import ConfigError


def unsupported(implementation: str, device) -> str | None:
    """Why a kernel of ``pallas_kernels`` cannot run on ``device``; None if it can or is none."""
    if implementation == "pallas_tpu" and device.platform != "tpu":
        return f"it needs a TPU, and this is compiled for {device.platform}"
    if implementation == "pallas_gpu":
        return gpu.unsupported(device)
    return None


def named(
    operation: str,
    implementation: str,
    names: Iterable[str],
    unsupported: Callable[[str], str | None],
) -> str:
    """``implementation``, which somebody asked for by name.

    Args:
      operation: what messages call it.
      names: of all implementations.
      unsupported: why the one of a name cannot be used here, or None.

    Raises:
      ConfigError: none has the name, or it cannot be used; says which there are, or why.
    """
    names = list(names)
    if implementation not in names:
        raise ConfigError(f"no {operation} {implementation!r}; there are: auto, {', '.join(names)}")
    reason = unsupported(implementation)
    if reason is not None:
        raise ConfigError(f"{operation} {implementation} cannot do this: {reason}; use auto")
    return implementation
