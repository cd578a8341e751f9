"""What the callers of the kernels share: the check of the device, types inside shard_map."""

from __future__ import annotations

import jax


def check_hopper() -> None:
    """Refuses a default device that is not a Hopper GPU.

    Raises:
      ValueError: the default device is another one.
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability.startswith("9."):
        raise ValueError(
            "the kernels need a Hopper GPU (compute capability 9.0), not"
            f" {device.device_kind} ({device.platform} {capability}); pass"
            " interpret=plgpu.InterpretGPUParams() to run them on a CPU"
        )


def vary_as(y, x):
    """``y``, declared to differ on the mesh axes of an enclosing shard_map on which ``x`` does.

    The results of ``plgpu.kernel`` carry no such axes.
    """
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(y, axes, to="varying") if axes else y
