"""What published runs reached of their chips: by ``benchmarks/plan_forecast.py``."""

#: Chip -> kind of work -> share of the peak.
CHIPS = {
    "A100": {
        "attention": 0.634,
        "dense": 0.621,
        "experts": 0.463,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "H100": {
        "attention": 0.589,
        "dense": 0.440,
        "experts": 0.328,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "tpu7x": {
        "attention": 0.366,
        "dense": 0.706,
        "experts": 0.502,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "v5e": {
        "attention": 0.649,
        "dense": 0.755,
        "experts": 0.563,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "v5p": {
        "attention": 0.657,
        "dense": 0.766,
        "experts": 0.571,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "v6e": {
        "attention": 0.336,
        "dense": 0.635,
        "experts": 0.477,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
    "H200": {
        "attention": 0.589,
        "dense": 0.440,
        "experts": 0.328,
        "elementwise": 0.617,
        "optimizer": 0.699,
    },
}

#: The same for chips without a published run.
OTHER_CHIPS = {
    "attention": 0.642,
    "dense": 0.647,
    "experts": 0.483,
    "elementwise": 0.617,
    "optimizer": 0.699,
}

#: Platform -> share of the collectives that nothing hides.
EXPOSED = {
    "tpu": 0.199,
    "gpu": 0.580,
}

#: Kind of model -> error that two thirds of the forecasts of unseen runs keep to.
SPREAD = {
    "dense": 0.058,
    "experts": 0.179,
}
