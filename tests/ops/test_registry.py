"""The one rule by which every operation chooses an implementation."""

from __future__ import annotations

import pytest

from step_jax.core.errors import ConfigError
from step_jax.ops import attention, cross_entropy, decode_attention, grouped_matmul, registry
from tests.devices import CPU, HOPPER, TPU

OPERATIONS = [m.OPERATION for m in (attention, cross_entropy, decode_attention, grouped_matmul)]


def entry(limit: int = 100, platform: str | None = None, least: int = 0) -> registry.Entry:
    def unsupported(problem, device):
        if platform not in (None, device.platform):
            return f"it is for {platform}"
        return f"{problem} is above {limit}" if problem > limit else None

    return registry.Entry(str, unsupported, worthwhile=lambda problem: problem >= least)


SUM = registry.Operation(
    "sum",
    {
        "small": entry(9, "tpu"),
        "plain": entry(),
        "large": entry(50, "tpu", least=3),
        "named": entry(),
    },
    fallback="plain",
    automatic={"tpu": ("small", "large")},
)


def test_auto_takes_the_first_of_the_platform_that_supports_the_problem_and_is_worthwhile():
    assert [SUM.resolve("auto", n, TPU) for n in (1, 9, 10, 50, 51)] == [
        "small", "small", "large", "large", "plain",
    ]  # fmt: skip
    assert {SUM.resolve("auto", 1, device) for device in (CPU, HOPPER, None)} == {"plain"}


def test_what_is_not_worthwhile_is_passed_over_by_auto_but_can_be_named():
    alone = registry.Operation("sum", SUM.implementations, "plain", {"tpu": ("large",)})
    assert alone.resolve("auto", 2, TPU) == "plain"
    assert alone.resolve("large", 2, TPU) == "large"


def test_a_name_that_is_not_there_or_cannot_do_it_says_why():
    with pytest.raises(ConfigError, match="no sum 'big'; there are: auto, small, plain, large, na"):
        SUM.resolve("big", 1, TPU)
    with pytest.raises(ConfigError, match="sum small cannot do this: 10 is above 9; use auto"):
        SUM.resolve("small", 10, TPU)
    with pytest.raises(ConfigError, match="sum small cannot do this: it is for tpu; use auto"):
        SUM.resolve("small", 1, CPU)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_auto_names_implementations_that_exist_and_falls_to_one_for_every_device(operation):
    named = {name for names in operation.automatic.values() for name in names}
    assert named <= set(operation.implementations)
    assert all(operation.implementations[name].kernel for name in named)
    fallback = operation.implementations[operation.fallback]
    assert not fallback.kernel
    assert all(fallback.unsupported(None, device) is None for device in (CPU, TPU, HOPPER))
