"""The one rule by which every operation chooses an implementation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pallas_kernels.tpu import aot, block_sizes, chips
from step_jax.core import hardware
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


@pytest.fixture(autouse=True)
def says_again():
    """What other tests were told is said here once more."""
    registry._say_once.cache_clear()


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


def test_what_auto_passes_over_is_said_in_one_line_and_once(caplog):
    for n in (70, 70, 71):
        SUM.resolve("auto", n, TPU)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "sum: auto passes over small: 70 is above 9",
        "sum: auto passes over large: 70 is above 50",
        "sum: auto passes over small: 71 is above 9",
        "sum: auto passes over large: 71 is above 50",
    ]


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


ATTENTION = attention.Problem(128, 128, 769, 769, "bfloat16", alibi=False, in_order=True)


@pytest.mark.parametrize(
    "kind", ["TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"]
)
def test_every_name_of_a_chip_gets_its_kernels(kind):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    assert attention.resolve("auto", ATTENTION, device) == "pallas_tpu"
    assert grouped_matmul.resolve("auto", None, device) == "pallas_tpu"
    name = registry.tpu_chip(device)
    assert chips.CHIPS[name].vmem == hardware.CHIPS[name].vmem_bytes
    assert set(chips.CHIPS) == set(aot.TOPOLOGIES) == set(block_sizes.table())


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v3", "TPU8t"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_chip_that_the_kernels_do_not_know_falls_back(operation, kind, caplog):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    problem = ATTENTION if operation is attention.OPERATION else None
    assert operation.resolve("auto", problem, device) == operation.fallback
    if operation.automatic:
        assert "auto passes over pallas_tpu: the chip 'T" in caplog.text.replace("'v4", "'TPU v4")
    with pytest.raises(ConfigError, match="is none of v5e, v5p, v6e, tpu7x; use auto"):
        operation.resolve("pallas_tpu", problem, device)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_auto_names_implementations_that_exist_and_falls_to_one_for_every_device(operation):
    named = {name for names in operation.automatic.values() for name in names}
    assert named <= set(operation.implementations)
    for platform, names in operation.automatic.items():
        # a CPU has no kernels, but may have a better way than the fallback
        assert platform == "cpu" or all(operation.implementations[n].kernel for n in names)
    fallback = operation.implementations[operation.fallback]
    assert not fallback.kernel
    assert all(fallback.unsupported(None, device) is None for device in (CPU, TPU, HOPPER))
