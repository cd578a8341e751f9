"""What every process is told by its environment, with the reason. A target adds to it."""

from __future__ import annotations

from collections.abc import Mapping

#: Platform of the devices -> variable -> (value, why).
#:
#: There are no flags for libtpu and XLA among them, on purpose: `step-jax plan` compiles with their
#: defaults, and what was planned is what should run. `LIBTPU_INIT_ARGS` in a target's `environment`
#: holds for the plan that `step-jax launch` makes as well.
VARIABLES: dict[str, dict[str, tuple[str, str]]] = {
    "all": {
        "PYTHONUNBUFFERED": ("1", "the last words of a process that is killed are not lost"),
        "PYTHONFAULTHANDLER": (
            "1",
            "a crash in C++, as JAX's when a peer is lost, prints where Python stood",
        ),
    },
    "tpu": {
        "JAX_PLATFORMS": (
            "tpu,cpu",
            "a host whose TPU does not start ends with an error instead of training on its CPU",
        ),
    },
    "gpu": {
        "JAX_PLATFORMS": ("cuda,cpu", "likewise"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": (
            "0.92",
            "of 75 % that JAX takes by default a quarter of the memory is never used",
        ),
    },
    "cpu": {"JAX_PLATFORMS": ("cpu", "no time goes into looking for what is not there")},
}


def environment(platform: str, cache: str | None, own: Mapping[str, str]) -> dict[str, str]:
    """Variables of every process.

    Args:
      platform: ``tpu``, ``gpu``, ``cpu``, or ``any`` for what the machine has.
      cache: folder for compiled programs that outlives the process; a restart does not compile.
      own: the target's; they win.
    """
    known = VARIABLES["all"] | VARIABLES.get(platform, {})
    found = {name: value for name, (value, _) in known.items()}
    if cache is not None:
        found["JAX_COMPILATION_CACHE_DIR"] = cache
    return found | dict(own)
