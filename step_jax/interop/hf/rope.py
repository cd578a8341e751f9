"""Rotary embeddings in a config.json.

transformers 4 has ``rope_theta`` at the top and ``rope_scaling`` beside it, transformers 5 writes
all of it into ``rope_parameters``. Both are read, and a file in which they say unlike things is
refused; both are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.interop.hf.keys import Keys
from step_jax.models.layers.positions import LinearScaling, Rope, RopeScaling, Scaling, Yarn

_THETA = 10_000.0
_LENGTH = "original_max_position_embeddings"


def one_rope(c: Keys) -> Rope:
    """The rotation that all layers share.

    Raises:
      ConfigError: unlike values in the two spellings.
    """
    new, old = c.table("rope_parameters"), c.table("rope_scaling")
    top, length = c.number("rope_theta", None), c.integer("max_position_embeddings", None)
    c.only(partial_rotary_factor=1.0)
    if any(isinstance(v, dict) for v in new.values.values()):
        c.unsupported("rope parameters that differ between layers")
        return Rope()
    rope = read_rope(old if old.values else new, top or _THETA, length)
    if top is not None and rope.theta != top:
        raise ConfigError(_conflict(c, "rope_theta", top, rope.theta))
    if old.values and new.values:
        # what transformers 5 writes for a plain rotation does not take back a scaling beside it
        also = read_rope(new, rope.theta, length)
        if also.theta != rope.theta:
            raise ConfigError(_conflict(c, "rope_theta in rope_parameters", also.theta, rope.theta))
        if also.scaling not in (None, rope.scaling):
            raise ConfigError(_conflict(c, "rope_parameters", new.values, old.values))
    if rope.fraction != 1.0:
        c.unsupported(f"partial_rotary_factor {rope.fraction}")
    return rope


def _conflict(c: Keys, name: str, one: Any, other: Any) -> str:
    return (
        f"{c.where} has {name} {one!r}, and beside it {other!r} for the same rotation: which of "
        f"them holds depends on the reader, so make them equal (rope_theta is {_THETA} where "
        f"rope_scaling stands without it)"
    )


def read_rope(k: Keys, theta: float, length: int | None) -> Rope:
    """The rotation in one table; ``theta`` and ``length`` hold where it does not say so."""
    kind = k.one_of(("rope_type", "type"), k.text, "default")
    rope = Rope(k.number("rope_theta", theta), k.number("partial_rotary_factor", 1.0))
    if kind not in ("default", *_READ):
        k.unsupported(f"rope scaling {kind!r} (only {', '.join(map(repr, _READ))})")
        return rope
    scaling = None if kind == "default" else _READ[kind](k, length)
    k.note_unread()
    return Rope(rope.theta, rope.fraction, scaling)


def _llama3(k: Keys, length: int | None) -> RopeScaling:
    return RopeScaling(
        factor=k.number("factor"),
        length=_original_length(k, length),
        low=k.number("low_freq_factor"),
        high=k.number("high_freq_factor"),
    )


def _linear(k: Keys, length: int | None) -> LinearScaling:
    return LinearScaling(k.number("factor"))


def _yarn(k: Keys, length: int | None) -> Yarn:
    return Yarn(
        factor=k.number("factor"),
        length=_original_length(k, length),
        fast=k.number("beta_fast", 0.0) or 32.0,
        slow=k.number("beta_slow", 0.0) or 1.0,
        truncate=k.flag("truncate", True),
        attention_factor=k.number("attention_factor", None),
        mscale=k.number("mscale", 0.0),
        mscale_all_dim=k.number("mscale_all_dim", 0.0),
    )


def _original_length(k: Keys, length: int | None) -> int:
    return k.integer(_LENGTH) if length is None or _LENGTH in k else k.integer(_LENGTH, length)


_READ: dict[str, Callable[[Keys, int | None], Scaling]] = {
    "llama3": _llama3,
    "linear": _linear,
    "yarn": _yarn,
}


def scaling_keys(scaling: Scaling | None) -> dict[str, Any]:
    """The keys of a scaling, in the words of either version."""
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    extension = {"rope_type": scaling.kind, "factor": scaling.factor, _LENGTH: scaling.length}
    if isinstance(scaling, RopeScaling):
        return extension | {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    extension |= {"beta_fast": scaling.fast, "beta_slow": scaling.slow}
    if not scaling.truncate:
        extension["truncate"] = False
    optional = {
        "attention_factor": scaling.attention_factor,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    return extension | {name: value for name, value in optional.items() if value}


def rope_keys(rope: Rope) -> dict[str, Any]:
    """The keys of a rotation that all layers share, in both spellings."""
    scaling = scaling_keys(rope.scaling)
    return {
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling is None else scaling,
    }
