"""What published runs reached of their chips: by ``benchmarks/plan_forecast.py``."""

#: Chip -> kind of work -> share of the peak.
CHIPS = {
    "A100": {
        "attention": 0.639,
        "dense": 0.611,
        "experts": 0.464,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "H100": {
        "attention": 0.591,
        "dense": 0.415,
        "experts": 0.315,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "tpu7x": {
        "attention": 0.363,
        "dense": 0.712,
        "experts": 0.529,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "v5e": {
        "attention": 0.655,
        "dense": 0.750,
        "experts": 0.570,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "v5p": {
        "attention": 0.662,
        "dense": 0.754,
        "experts": 0.572,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "v6e": {
        "attention": 0.347,
        "dense": 0.633,
        "experts": 0.477,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
    "H200": {
        "attention": 0.591,
        "dense": 0.415,
        "experts": 0.315,
        "elementwise": 0.626,
        "optimizer": 0.700,
    },
}

#: The same for chips without a published run.
OTHER_CHIPS = {
    "attention": 0.647,
    "dense": 0.638,
    "experts": 0.484,
    "elementwise": 0.626,
    "optimizer": 0.700,
}

#: Platform -> share of the collectives that nothing hides.
EXPOSED = {
    "tpu": 0.198,
    "gpu": 0.752,
}

#: Kind of model -> error that two thirds of the forecasts of unseen runs keep to.
SPREAD = {
    "dense": 0.087,
    "experts": 0.109,
}
