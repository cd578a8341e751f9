"""How long a step is likely to take, from what published runs reached of their chips.

A step's work is counted by layer and kind (``planning.layers``). Of every kind a share of the peak
is reached, which differs by chip; collectives add the part of them that nothing hides. The shares
are fitted to published runs by ``benchmarks/plan_forecast.py``, which also says by how much the
forecasts of runs that it has not seen are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from step_jax.planning import roofline
from step_jax.planning.efficiencies import CHIPS, EXPOSED, OTHER_CHIPS, SPREAD
from step_jax.planning.layers import BYTES
from step_jax.planning.topology import Topology

Work = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step.

    Attributes:
      step: the forecast.
      low, high: within which two thirds of published runs would lie, by those held out.
      layers: layer -> its share of ``step``, collectives apart.
      exposed: what collectives add that nothing hides.
      known: whether runs on this chip, or one of its kind, were published.
    """

    step: float
    low: float
    high: float
    layers: dict[str, float]
    exposed: float
    known: bool


def shares(topology: Topology) -> tuple[dict[str, float], bool]:
    """(kind of work -> the share of the peak that is reached, whether by runs on such a chip)."""
    assert topology.chip is not None, "simulated devices have no peak"
    name = topology.chip.name
    return (CHIPS[name], True) if name in CHIPS else (OTHER_CHIPS, False)


def ideal(work: Work, topology: Topology, dtype: str) -> dict[tuple[str, str], float]:
    """(layer, kind) -> seconds of the work at the peak of what limits it."""
    assert topology.chip is not None
    peak, bandwidth = roofline.peak(topology, dtype), topology.chip.hbm_bandwidth
    return {
        (layer, kind): amount / (bandwidth if kind in BYTES else peak)
        for (layer, kind), amount in work.items()
    }


def combine(
    seconds: Work, network: float, reached: Mapping[str, float], exposed: float
) -> tuple[dict[str, float], float]:
    """(seconds of each layer, seconds of the collectives that nothing hides).

    Args:
      seconds: (layer, kind) -> at the peak, see ``ideal``.
      network: of all collectives, one after the other at the peak of their links.
      reached: kind -> share of the peak.
      exposed: share of the collectives that is not hidden where there is enough to hide them.
    """
    layers: dict[str, float] = {}
    for (layer, kind), at_peak in seconds.items():
        layers[layer] = layers.get(layer, 0.0) + at_peak / reached[kind]
    return layers, max(exposed * network, network - sum(layers.values()))


def forecast(
    work: Work, network: Mapping[str, float], topology: Topology, dtype: str, least: float = 0.0
) -> Forecast | None:
    """The forecast of a step's work on one device; None for simulated devices.

    Args:
      network: mesh axes -> seconds, see ``roofline.network``.
      least: seconds that no step can beat, nor any end of the range.
    """
    if topology.chip is None:
        return None
    reached, known = shares(topology)
    at_peak = ideal(work, topology, dtype)
    exposed = EXPOSED[topology.platform]
    layers, alone = combine(at_peak, sum(network.values()), reached, exposed)
    step = max(sum(layers.values()) + alone, least)
    has_experts = any(kind == "experts" and amount for (_, kind), amount in work.items())
    spread = SPREAD["experts" if has_experts else "dense"] * (1 if known else 2)
    low, high = max(step / (1 + spread), least), step * (1 + spread)
    return Forecast(step, low, high, layers, alone, known)
