"""Whatever a configuration holds, its YAML loads back to an equal one."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_jax.core.config import config_hash, parse_config, to_yaml
from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Left:
    kind: ClassVar[str] = "left"
    number: float = 0.0


@dataclass(frozen=True)
class Right:
    kind: ClassVar[str] = "right"
    words: tuple[str, ...] = ("a",)
    count: int | None = 3


@dataclass(frozen=True)
class Tree:
    side: Left | Right
    sides: tuple[Left | Right, ...] = (Left(),)
    text: str = "x"
    maybe: str | None = "default"
    flag: bool = True
    mixed: Literal["auto", "no"] | int = "auto"
    path: Path = Path("p")
    table: dict[str, float] = field(default_factory=lambda: {"default": 1.0})
    pair: tuple[int, str] = (1, "b")


TRAPS = st.sampled_from(
    [
        "no",
        "null",
        "none",
        "None",
        "~",
        "",
        "1e4",
        "12:30",
        "1_000",
        "true",
        "<<",
        "=",
        "0x1",
        "- a",
    ]
)
words = st.one_of(TRAPS, st.text())
floats = st.floats(allow_nan=False)
integers = st.integers()
lefts = st.builds(Left, floats)
rights = st.builds(Right, st.lists(words, max_size=3).map(tuple), st.none() | integers)
paths = words.filter(lambda t: "\0" not in t and not t.startswith("~")).map(Path)
trees = st.builds(
    Tree,
    side=lefts | rights,
    sides=st.lists(lefts | rights, max_size=3).map(tuple),
    text=words,
    maybe=st.none() | words,
    flag=st.booleans(),
    mixed=st.sampled_from(["auto", "no"]) | integers,
    path=paths,
    table=st.dictionaries(words, floats, max_size=3),
    pair=st.tuples(integers, words),
)


@given(trees)
def test_yaml_round_trip(tree):
    text = to_yaml(tree)
    again = parse_config(Tree, text)
    assert again == tree
    assert to_yaml(again) == text
    assert config_hash(again) == config_hash(tree)


@given(st.text())
def test_any_text_is_a_configuration_or_a_config_error(text):
    try:
        parse_config(Left, text)
    except ConfigError:
        pass


@given(st.text(alphabet="0123456789_.eE+-:", min_size=1, max_size=8))
def test_numbers_agree_with_python(text):
    """What is accepted as a number means what Python says it means."""
    try:
        value = parse_config(Left, f"number: {text}").number
    except ConfigError:
        return
    assert value == float(text) and math.isfinite(float(text)) == math.isfinite(value)


def test_round_trip_notices_a_difference():
    assert parse_config(Tree, to_yaml(Tree(Left()))) != Tree(Right())
    with pytest.raises(ConfigError):
        parse_config(Tree, to_yaml(Left()))
