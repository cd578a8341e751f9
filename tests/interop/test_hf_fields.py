"""Every field of a decoder's configuration is written by an export, or the export is refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError
from step_jax.interop import hf
from step_jax.interop.artifacts import OF_TRAINING
from step_jax.interop.hf.tensors import layout
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.positions import Rope
from step_jax.models.text.decoder import Group
from tests.golden import golden

#: Together they have every kind of layer that an export knows.
NAMES = ("qwen2", "llama_linear", "llama_yarn", "qwen3_moe", "deepseek_v3_moe", "step3p7")


def variants(value: Any, hint: Any) -> Iterator[tuple[str, Any]]:
    """(field, the value with another content of it) for each field of a tree of configurations."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for f in dataclasses.fields(value):
            old, name = getattr(value, f.name), f"{type(value).__name__}.{f.name}"
            if not dataclasses.is_dataclass(old):
                yield name, value  # to be tried, even if no other content of it is known here
            for new in others(old, hints[f.name]):
                yield name, dataclasses.replace(value, **{f.name: new})
            for inner, new in variants(old, hints[f.name]):
                yield inner, dataclasses.replace(value, **{f.name: new})
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            for name, new in variants(item, None):
                yield name, (*value[:i], new, *value[i + 1 :])


def others(old: Any, hint: Any) -> Iterator[Any]:
    """Values that a field of a type may have instead."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for one in arguments:
            yield from others(old if fits(old, one) else None, one)
    elif hint is type(None):
        if old is not None:
            yield None
    elif kind is Literal:
        yield from (a for a in arguments if a != old)
    elif kind is tuple:
        yield old * 2 if old else made(hint) * 2
    elif hint is bool:
        yield not old
    elif hint in (int, float):
        yield from {made(hint), hint(1)} if old is None else {old + 1, old * 2, hint(old / 2)}
    elif dataclasses.is_dataclass(hint) and old is None:
        yield made(hint)


def fits(value: Any, hint: Any) -> bool:
    plain = typing.get_origin(hint) or hint
    return isinstance(plain, type) and isinstance(value, plain)


def made(hint: Any) -> Any:
    """Some value of a type."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType, Literal):
        return arguments[0] if kind is Literal else made(arguments[0])
    if kind is tuple:
        return (made(arguments[0]),)
    if not dataclasses.is_dataclass(hint):
        return {int: 4, float: 1.5, bool: True, str: ""}[hint]
    hints = typing.get_type_hints(hint)
    required = (f for f in dataclasses.fields(hint) if f.default is f.default_factory)
    return hint(**{f.name: made(hints[f.name]) for f in required})


def possible(config) -> bool:
    """Whether it is a decoder at all."""
    try:
        validate(config)
        config.specs()
    except (ConfigError, TypeError, AssertionError, ZeroDivisionError):
        return False
    return True


@pytest.mark.thorough
def test_no_field_is_lost_on_the_way_out():
    """A new field of any layer that export does not know of fails here."""
    fields, tried, untouched = set(), set(), OF_TRAINING | {"FanIn.gain"}
    for name in NAMES:
        base = hf.config_from_hf(golden.load(name).config)
        expected = hf.config_to_hf(base)
        for field, other in variants(base, None):
            fields.add(field)
            if other == base or not possible(other):
                continue
            tried.add(field)
            try:
                keys = hf.config_to_hf(other)
                layout(other)
            except ConfigError:
                assert field not in untouched, (name, field)
                continue
            assert (keys == expected) == (field in untouched), f"{name}: {field} is lost: {other}"
            assert hf.config_to_hf(hf.config_from_hf(keys)) == keys
    assert tried == fields  # each could be changed in one of the models at least


def test_a_rotation_of_several_axes_is_refused():
    base = hf.config_from_hf(golden.load("llama_gqa").config)
    block = base.layers[0].blocks[0]
    rope = Rope(block.attention.position.theta, axes=(8, 8))
    attention = dataclasses.replace(block.attention, position=rope)
    group = dataclasses.replace(
        base.layers[0], blocks=(dataclasses.replace(block, attention=attention),)
    )
    with pytest.raises(ConfigError, match=r"layer 0\.attention\.position\.axes is \(8, 8\)"):
        hf.config_to_hf(dataclasses.replace(base, layers=(group,)))


def test_a_layer_with_attention_of_another_kind_is_refused_by_its_number():
    base = hf.config_from_hf(golden.load("step3p7").config)
    block = dataclasses.replace(base.layers[0].blocks[0], attention=MFA(heads=4, head_dim=8))
    mixed = dataclasses.replace(base, layers=(*base.layers, Group(1, (block,))))
    with pytest.raises(ConfigError, match="layer 4 has MFA attention, the first MHA: .* one kind"):
        hf.config_to_hf(mixed)
