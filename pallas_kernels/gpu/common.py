"""What the callers of the kernels share: the check of the device, types inside shard_map."""

from __future__ import annotations

import jax


def unsupported(device) -> str | None:
    """Why the kernels cannot run on ``device``, or None.

    Their products are wgmma instructions of sm_90a, which no other generation has: neither Ampere
    nor Blackwell, whose tensor cores are programmed by tcgen05.
    """
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform == "gpu" and capability.startswith("9."):
        return None
    found = f"{device.platform} {capability}".rstrip()
    return f"it needs a Hopper GPU (compute capability 9.0), and this is compiled for {found}"


def check_device(kernel: str, device=None, interpret=None) -> None:
    """Refuses what is not a Hopper GPU.

    Args:
      kernel: what the message calls it.
      device: one of those compiled for; None for the default.
      interpret: not None if the kernel is interpreted, which any device can do.

    Raises:
      ValueError: the device is another one.
    """
    reason = unsupported(jax.devices()[0] if device is None else device)
    if interpret is None and reason is not None:
        raise ValueError(
            f"the GPU kernel for {kernel} cannot run: {reason}; pass "
            "interpret=plgpu.InterpretGPUParams() to interpret it on a CPU"
        )


def vary_as(y, x):
    """``y``, declared to differ on the mesh axes of an enclosing shard_map on which ``x`` does.

    The results of ``plgpu.kernel`` carry no such axes.
    """
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(y, axes, to="varying") if axes else y
