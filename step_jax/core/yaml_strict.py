"""YAML as text with positions: the layer below typed configuration.

PyYAML guesses the type of a plain scalar by YAML 1.1 (``3e-4`` is text, ``no`` is false, ``12:30``
is 750) and keeps the last of two equal keys. Here nothing is guessed: a file becomes a tree of
:class:`Mapping`, :class:`Sequence` and :class:`Scalar` nodes that keep the text as written and
where it stands; :mod:`step_jax.core.config` converts the text by the declared type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from step_jax.core.errors import ConfigError
from step_jax.core.text import is_utf8, printable

BASE_KEY = "base"
KIND_KEY = "kind"
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Scalar:
    """Text as written. ``quoted`` text is only ever a string."""

    text: str
    quoted: bool
    origin: str


@dataclass(frozen=True)
class Sequence:
    items: tuple[Node, ...]
    origin: str


@dataclass(frozen=True)
class Mapping:
    """``key_origins`` says where each key stands. A ``patch`` comes from dotted command-line flags:
    over a sequence its keys are indices, and it never replaces what it does not name.
    ``layers`` says which of the merged files a key is from, the upper ones with higher numbers;
    a key that it lacks is from the lowest (0)."""

    entries: dict[str, Node]
    key_origins: dict[str, str]
    origin: str
    patch: bool = False
    layers: dict[str, int] = field(default_factory=dict)


Node = Scalar | Sequence | Mapping


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest option, or the empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def parse_yaml(text: str, name: str) -> Node:
    """The tree of one YAML document.

    Args:
      text: YAML.
      name: what messages call the document, a file name as a rule.

    Raises:
      ConfigError: bad syntax, duplicate keys, tags, aliases or several documents, with the line.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        raise ConfigError(f"{name}{line}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line_number}: unprintable character in the text") from None
    if root is None:
        return Mapping({}, {}, f"{name}:1")
    return _convert(root, name, seen=set())


def _convert(node: yaml.Node, name: str, seen: set[int]) -> Node:
    origin = f"{name}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise ConfigError(
            f"{origin}: aliases are not supported; write the value out or use `base:`"
        )
    seen.add(id(node))
    if not (node.tag or "").startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise ConfigError(f"{origin}: tags such as '{node.tag}' are not supported")
    if isinstance(node, yaml.ScalarNode):
        if not is_utf8(node.value):  # half of a character, written as an escape
            raise ConfigError(f"{origin}: {printable(node.value)!r} is not Unicode text")
        return Scalar(node.value, node.style is not None, origin)
    if isinstance(node, yaml.SequenceNode):
        return Sequence(tuple(_convert(child, name, seen) for child in node.value), origin)
    assert isinstance(node, yaml.MappingNode)
    entries: dict[str, Node] = {}
    key_origins: dict[str, str] = {}
    for key_node, value_node in node.value:
        key_origin = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{key_origin}: a key must be a word")
        key = key_node.value
        if key in entries:
            raise ConfigError(
                f"{key_origin}: duplicate key '{key}' (first given at {key_origins[key]})"
            )
        entries[key] = _convert(value_node, name, seen)
        key_origins[key] = key_origin
    return Mapping(entries, key_origins, origin)


def load_yaml(path: Path) -> Mapping:
    """The tree of a file merged over its ``base:`` files (paths relative to the naming file)."""
    return _load(Path(path), chain=())


def _load(path: Path, chain: tuple[Path, ...]) -> Mapping:
    identity = path.resolve()
    if identity in chain:
        names = " -> ".join(p.name for p in (*chain, identity))
        raise ConfigError(f"{path}: `base:` goes round in a circle: {names}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{tree.origin}: a configuration is a mapping of `key: value` lines")
    base = tree.entries.get(BASE_KEY)
    if base is None:
        return tree
    if not isinstance(base, Scalar) or not base.text:
        raise ConfigError(f"{base.origin}: `base:` must name one file")
    del tree.entries[BASE_KEY], tree.key_origins[BASE_KEY]
    lower = _load(path.parent / Path(base.text).expanduser(), (*chain, identity))
    merged = merge(lower, tree)
    assert isinstance(merged, Mapping)
    return merged


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml")))


def merge(lower: Node | None, upper: Node) -> Node:
    """``upper`` over ``lower``: mappings merge key by key, anything else is replaced.

    A mapping whose ``kind`` differs from the one below replaces it, since the other
    kind's keys would mean nothing.
    """
    if not isinstance(upper, Mapping) or lower is None:
        return upper
    if isinstance(lower, Sequence) and upper.patch:
        return _patch_sequence(lower, upper)
    if not isinstance(lower, Mapping):
        return upper
    low_kind, up_kind = lower.entries.get(KIND_KEY), upper.entries.get(KIND_KEY)
    if isinstance(low_kind, Scalar) and isinstance(up_kind, Scalar):
        if low_kind.text != up_kind.text:
            return upper
    entries = dict(lower.entries)
    for key, node in upper.entries.items():
        entries[key] = merge(entries.get(key), node)
    key_origins = {**lower.key_origins, **upper.key_origins}
    origin = lower.origin if upper.patch else upper.origin
    both_patch = lower.patch and upper.patch  # all flags are one layer
    above = 0 if both_patch else 1 + max(lower.layers.values(), default=0)
    layers = {key: above + upper.layers.get(key, 0) for key in upper.entries}
    return Mapping(entries, key_origins, origin, both_patch, {**lower.layers, **layers})


def _patch_sequence(lower: Sequence, upper: Mapping) -> Sequence:
    items = list(lower.items)
    for key, node in upper.entries.items():
        if not key.isdecimal() or int(key) >= len(items):
            raise ConfigError(
                f"{upper.key_origins[key]}: no item {key}; valid items are 0 to {len(items) - 1} "
                f"of the list given at {lower.origin}"
            )
        items[int(key)] = merge(items[int(key)], node)
    return replace(lower, items=tuple(items))


def relabel(node: Node, origin: str) -> Node:
    """The same tree with every origin replaced by ``origin``."""
    if isinstance(node, Scalar):
        return replace(node, origin=origin)
    if isinstance(node, Sequence):
        return Sequence(tuple(relabel(item, origin) for item in node.items), origin)
    entries = {key: relabel(item, origin) for key, item in node.entries.items()}
    return replace(node, entries=entries, key_origins=dict.fromkeys(entries, origin), origin=origin)
