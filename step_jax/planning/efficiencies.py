"""What published runs reached of their chips: written by ``benchmarks/plan_forecast.py``."""

#: Chip -> kind of work -> share of the peak.
CHIPS: dict[str, dict[str, float]] = {}

#: The same for chips without a published run.
OTHER_CHIPS = {
    "attention": 0.4, "dense": 0.75, "experts": 0.6, "elementwise": 0.7, "optimizer": 0.7,
}  # fmt: skip

#: Platform -> share of the collectives that is not hidden.
EXPOSED = {"tpu": 0.2, "gpu": 0.3}

#: Kind of model -> by how much forecasts of runs that were held out are wrong, typically.
SPREAD = {"dense": 0.1, "experts": 0.2}
