"""Whether a recipe fits a target, asked before anything is submitted."""

from __future__ import annotations

from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.launch.gke import Gke
from step_jax.launch.queued import QueuedResources
from step_jax.launch.target import Target
from step_jax.planning import report, topology
from step_jax.planning.compiled import program_for, resolved
from step_jax.planning.plan import Request, make_plan
from step_jax.runs.device_memory import DoesNotFit


def check(loop: Any, config: Any, target: Target, recipe: str, *, compiled: bool) -> str:
    """Says in words what was checked.

    Args:
      compiled: compile the step for the devices, which takes from seconds to minutes.

    Raises:
      ConfigError: mesh, batch or a layer does not divide over the target's devices.
      DoesNotFit: the step needs more memory than a device has.
    """
    place = target.place
    if place.devices is None:
        return "this machine's devices: the run checks them when it starts"
    config = resolved(config, place.devices)
    if isinstance(place, Gke | QueuedResources):
        return _check_tpu(loop, config, place, recipe, compiled=compiled)
    kind = "gpu" if place.platform == "gpu" else "cpu"
    devices = topology.paper_devices(kind, kind, place.devices)
    there = topology.Topology(
        f"{place.devices} devices", kind, None, place.devices, place.devices, 1, (), devices, True
    )
    program_for(loop, config, there)
    return f"mesh and batch divide over {place.devices} devices; memory was not planned"


def _check_tpu(
    loop: Any, config: Any, place: Gke | QueuedResources, recipe: str, *, compiled: bool
) -> str:
    try:
        there = topology.parse(place.topology, place.slices)
    except ConfigError as error:
        if compiled:
            raise ConfigError(f"{error}\n(--force submits without a plan)") from None
        return f"mesh divides over {place.devices} devices; nothing else was checked: {error}"
    program_for(loop, config, there)
    if not compiled:
        return f"mesh and batch divide over {there.name}; submitting compiles and plans memory"
    plan = make_plan(loop, config, there, Request(recipe))
    assert plan.memory_limit is not None, "chips have one"
    need, have = (report.gigabytes(n) for n in (plan.memory_compiler, plan.memory_limit))
    if not plan.fits:
        search = f"step-jax plan {recipe} --topology {place.topology} --search"
        raise DoesNotFit(
            f"{recipe} needs {need} of the {have} of a device of {there.name}: `{search}` looks "
            "for what fits; --force submits all the same"
        )
    step = f"a step takes {plan.bound_s:.3g} s or more"
    return f"{need} of the {have} of a device of {there.name}; {step}"
