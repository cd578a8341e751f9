"""Operations with several implementations: a table of them, and one way to choose one."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.gpu import common as gpu
from pallas_kernels.tpu import chips
from step_jax.core import hardware
from step_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One implementation of an operation.

    compute: takes what the operation's module says.
    unsupported: (problem, device) -> why the problem cannot be computed on the device, or None.
    kernel: the partitioner cannot cut it; on a mesh it runs in ``shard_map``.
    worthwhile: ``auto`` passes it over for problems of which this is false.
    """

    compute: Callable
    unsupported: Callable[[Any, jax.Device], str | None] = lambda problem, device: None
    kernel: bool = False
    worthwhile: Callable[[Any], bool] = lambda problem: True


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an operation is called in messages, its implementations, and what ``auto`` stands for.

    ``auto`` takes the first of ``automatic`` for the device's platform that supports the problem
    and is worthwhile, and else ``fallback``, which supports every problem. What does not support
    the problem is passed over in one line of the log, which is written once.
    """

    name: str
    implementations: Mapping[str, Entry]
    fallback: str
    automatic: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def resolve(self, implementation: str, problem, device: jax.Device | None = None) -> str:
        """The implementation to compute with; what ``auto`` stands for (the run header prints it).

        Args:
          implementation: a name, or ``auto``.
          problem: what decides whether an implementation can do it.
          device: one of those compiled for, which need not be this machine's; None for the default.

        Raises:
          ConfigError: no implementation has the name, or the one named cannot do this; says why.
        """
        device = jax.devices()[0] if device is None else device
        if implementation == "auto":
            for name in self.automatic.get(device.platform, ()):
                if not self.implementations[name].worthwhile(problem):
                    continue
                reason = self._reason_against(name, problem, device)
                if reason is None:
                    return name
                _say_once(f"{self.name}: auto passes over {name}: {reason}")
            return self.fallback
        if implementation not in self.implementations:
            names = ", ".join(["auto", *self.implementations])
            raise ConfigError(f"no {self.name} {implementation!r}; there are: {names}")
        reason = self._reason_against(implementation, problem, device)
        if reason is not None:
            raise ConfigError(f"{self.name} {implementation} cannot do this: {reason}; use auto")
        return implementation

    def _reason_against(self, name: str, problem, device) -> str | None:
        reason = self.implementations[name].unsupported(problem, device)
        return reason or _DISTRUSTED.get((self.name, name, device.device_kind))


#: (operation, implementation, kind of device) -> what was wrong with it there, see ``distrust``.
_DISTRUSTED: dict[tuple[str, str, str], str] = {}


def distrust(reasons: Mapping[tuple[str, str, str], str]) -> None:
    """From here on these implementations are passed over, as if they did not support anything.

    That a kernel computes wrong numbers on a kind of chip is a fact like those that ``unsupported``
    tells, but one that is known only after it has run (``ops.selfcheck``).

    Args:
      reasons: (operation, implementation, kind of device) -> why; they replace those of before.
    """
    if reasons != _DISTRUSTED:
        jax.clear_caches()  # what was traced with another choice is traced again
        _DISTRUSTED.clear()
        _DISTRUSTED.update(reasons)


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger("step_jax.ops").warning(line)


def kernel(compute: Callable, lacks: Callable, unsupported: Callable, **fields) -> Entry:
    """The entry of a kernel; ``lacks``: (device) -> why it cannot run there at all, or None."""

    def either(problem, device):
        return lacks(device) or unsupported(problem, device)

    return Entry(compute, either, kernel=True, **fields)


def tpu_chip(device: jax.Device) -> str:
    """The chip of ``device`` as the kernels for TPUs name it, or what JAX calls an unknown one."""
    chip = hardware.detect(device)
    return device.device_kind if chip is None else chip.name


def interpreted_chip(device: jax.Device) -> str:
    """The same where a kernel is interpreted: that of a v6e on what is no TPU."""
    return "v6e" if needs_tpu(device) else tpu_chip(device)


def needs_tpu(device: jax.Device) -> str | None:
    """Why a kernel for TPUs cannot run on ``device``, or None."""
    if device.platform == "tpu":
        return chips.unsupported(tpu_chip(device))
    return f"it needs a TPU, and this is compiled for {device.platform}"


def needs_hopper(device: jax.Device) -> str | None:
    """Why a kernel for Hopper GPUs cannot run on ``device``, or None."""
    return gpu.unsupported(device)


def refusal(check: Callable[..., None], *arguments) -> str | None:
    """What ``check``, which raises a ValueError for what a kernel lacks, has against these."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return None
