"""Typed configuration: frozen dataclasses are the only schema.

Precedence: dataclass defaults < ``base:`` file < file(s) < command line. Text becomes values by the
declared type alone (see :mod:`step_jax.core.yaml_strict`), so a value means the same in a file and
in a flag. Supported types: bool, int, float, str, Path, Enum, Literal, None, unions of these,
``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, and dataclasses. A union of dataclasses is
told apart by the key ``kind``, which each of them defines as ``kind: ClassVar[str]``.

A dataclass may name keys that stand instead of each other: ``alternatives`` is a class variable
``{key: (keys that belong to it, ...)}``. Of several that are set, those of the uppermost file (or
of the command line) count; the others, and what belongs to them, are as if nobody had set them.

A dataclass may define ``validate(self)``; it is called once the whole configuration is known, and
its ``ValueError`` is reported with the key and the place in the file.

The module imports no JAX: a wrong key is reported before any device is touched.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from step_jax.core import yaml_strict
from step_jax.core.errors import ConfigError
from step_jax.core.storage import local
from step_jax.core.yaml_strict import (
    COMMAND_LINE,
    DEFAULT,
    KIND_KEY,
    Mapping,
    Node,
    Scalar,
    Sequence,
    did_you_mean,
)

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*)?\.?[0-9]*([eE][-+]?[0-9]+)?")
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = {"", "~", "null", "none"}
_MAX_REPORTED = 10


@dataclass(frozen=True)
class Loaded[T]:
    """A configuration and where it came from.

    Attributes:
      config: the dataclass instance.
      origins: key path (``optimizer.peak_lr``) -> ``default``, ``x.yaml:12`` or ``command line``.
      hash: sha256 over the resolved values, see :func:`config_hash`.
      yaml_text: the resolved configuration; loading it gives ``config`` again.
    """

    config: T
    origins: dict[str, str]
    hash: str
    yaml_text: str

    def explain(self) -> str:
        """One line for every value: key, value, origin."""
        return explain(self.config, self.origins)


def load_file[T](cls: type[T], path: Path | str) -> T:
    """The configuration in a file, for instance the ``config.yaml`` of a run directory."""
    return from_tree(cls, yaml_strict.load_yaml(Path(path))).config


def parse_config[T](cls: type[T], text: str, name: str = "<config>") -> T:
    """The configuration in ``text``, for instance the one stored in a checkpoint."""
    return from_tree(cls, yaml_strict.parse_yaml(text, name)).config


def from_tree[T](cls: type[T], tree: Node, *, check: bool = True) -> Loaded[T]:
    """Convert and validate a tree of text nodes. Raises ConfigError naming up to ten problems."""
    converter = _Converter()
    config = converter.convert(cls, tree)
    if check:
        validate(config, converter.origins)
    return Loaded(config, converter.origins, config_hash(config), to_yaml(config))


def with_placeholders[T](cls: type[T], tree: Node, placeholder: Callable[[Any], Any]) -> T:
    """The configuration with ``placeholder(declared type)`` for required keys that are missing."""
    return _Converter(placeholder).convert(cls, tree)


# --- From text to values ------------------------------------------------------------------------


@functools.cache
def schema(cls: type) -> dict[str, Any]:
    """Field name -> declared type of a dataclass, without ``Annotated`` wrappers."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def kind_of(cls: type) -> str | None:
    """The tag of a dataclass in a union, or None if it has no ``kind: ClassVar[str]``."""
    kind = getattr(cls, KIND_KEY, None)
    is_field = any(f.name == KIND_KEY for f in dataclasses.fields(cls))
    return kind if isinstance(kind, str) and not is_field else None


def members(declared: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is no union is its own only member."""
    if typing.get_origin(declared) in (Union, types.UnionType):
        return tuple(m for part in typing.get_args(declared) for m in members(part))
    return (declared,)


def type_name(declared: Any) -> str:
    """A declared type in words for messages."""
    parts = members(declared)
    if len(parts) > 1:
        return " or ".join(type_name(p) for p in parts)
    if declared is type(None):
        return "null"
    if typing.get_origin(declared) is Literal:
        return " or ".join(repr(v) for v in typing.get_args(declared))
    if typing.get_origin(declared) in (tuple, dict):
        return str(declared).replace("typing.", "")
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        return " or ".join(repr(m.value) for m in declared)
    return getattr(declared, "__name__", str(declared))


_BAD: Any = object()


_EMPTY = Mapping({}, {}, DEFAULT)


class _Converter:
    """Walks a tree and a schema together; gathers errors and origins on the way."""

    def __init__(self, placeholder: Callable[[Any], Any] | None = None):
        self.placeholder = placeholder
        self.errors: list[str] = []
        self.origins: dict[str, str] = {}

    def convert(self, cls: type, tree: Node) -> Any:
        config = self.group((cls,), tree, "", dataclasses.MISSING)
        if self.errors:
            shown = self.errors[:_MAX_REPORTED]
            if len(self.errors) > len(shown):
                shown.append(f"... and {len(self.errors) - len(shown)} more")
            raise ConfigError("\n".join(shown))
        return config

    def fail(self, origin: str, path: str, message: str) -> Any:
        where = f"{origin}: " if origin != DEFAULT else ""
        self.errors.append(f"{where}{path}: {message}" if path else f"{where}{message}")
        return _BAD

    def value(self, declared: Any, node: Node, path: str, default: Any) -> Any:
        """``node`` as ``declared``; ``default`` is what would stand here without it."""
        parts = members(declared)
        if isinstance(node, Mapping):
            if node.patch and isinstance(default, tuple | dict):
                node = yaml_strict.merge(_to_node(default), node)
                return self.value(declared, node, path, dataclasses.MISSING)
            classes = tuple(p for p in parts if dataclasses.is_dataclass(p))
            if classes:
                return self.group(classes, node, path, default)
            for part in parts:
                if typing.get_origin(part) is dict:
                    return self.table(part, node, path)
            if node.patch and any(typing.get_origin(p) is tuple for p in parts):
                return self.fail(
                    COMMAND_LINE, path, "has no items to change; give the list in a file"
                )
        if isinstance(node, Sequence):
            for part in parts:
                if typing.get_origin(part) is tuple:
                    return self.items(part, node, path)
        if isinstance(node, Scalar):
            self.origins[path] = node.origin
            for part in sorted(parts, key=lambda p: p is str):  # text fits anything: try it last
                value = scalar(part, node)
                if value is not _BAD:
                    return value
        return self.fail(node.origin, path, f"expected {type_name(declared)}, got {_show(node)}")

    def items(self, declared: Any, node: Sequence, path: str) -> Any:
        args = typing.get_args(declared)
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(node.items)
        elif args == ((),):
            args = ()
        if len(args) != len(node.items):
            return self.fail(
                node.origin, path, f"expected {len(args)} items, got {len(node.items)}"
            )
        self.origins[path] = node.origin
        pairs = zip(args, node.items, strict=True)
        return tuple(
            self.value(arg, item, f"{path}.{i}", dataclasses.MISSING)
            for i, (arg, item) in enumerate(pairs)
        )

    def table(self, declared: Any, node: Mapping, path: str) -> Any:
        self.origins[path] = node.origin
        value_type = typing.get_args(declared)[1]
        return {
            key: self.value(value_type, item, f"{path}.{key}", dataclasses.MISSING)
            for key, item in node.entries.items()
        }

    def group(self, classes: tuple[Any, ...], node: Node, path: str, default: Any) -> Any:
        if not isinstance(node, Mapping):
            return self.fail(node.origin, path, "expected `key: value` lines")
        cls = self.choose(classes, node, path, default)
        if cls is None:
            return _BAD
        self.origins[path] = node.origin
        hints = schema(cls)
        prefix = f"{path}." if path else ""
        for key, key_origin in node.key_origins.items():
            if key not in hints and not (key == KIND_KEY and kind_of(cls)):
                hint = did_you_mean(key, hints)
                self.fail(key_origin, "", f"unknown key '{prefix}{key}'{hint}")
        values = {}
        errors_before = len(self.errors)
        replaced = _replaced(cls, node)
        for field in dataclasses.fields(cls):
            if field.name not in hints:
                continue
            sub_path = prefix + field.name
            in_place = type(default) is cls and field.name not in replaced
            standing = _standing(field, default if in_place else None)
            if field.name in node.entries and field.name not in replaced:
                sub_node = node.entries[field.name]
                values[field.name] = self.value(hints[field.name], sub_node, sub_path, standing)
            elif standing is None and not path and (group := self._optional(hints[field.name])):
                values[field.name] = self.group(group, _EMPTY, sub_path, dataclasses.MISSING)
            elif standing is not dataclasses.MISSING:
                values[field.name] = standing
                self.record_default(standing, sub_path)
            elif self.placeholder is not None:
                values[field.name] = self.placeholder(hints[field.name])
            else:
                declared = type_name(hints[field.name])
                self.fail(node.origin, sub_path, f"is required ({declared}) and has no default")
        if len(self.errors) > errors_before or any(v is _BAD for v in values.values()):
            return _BAD
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            return self.fail(node.origin, path, str(error))

    def _optional(self, declared: Any) -> tuple[Any, ...]:
        """The group that a page of help shows although nothing stands in its place, if it is one:
        of several kinds none is more likely."""
        if self.placeholder is None:
            return ()
        groups = tuple(part for part in members(declared) if dataclasses.is_dataclass(part))
        return groups if len(groups) == 1 else ()

    def choose(self, classes: tuple[Any, ...], node: Mapping, path: str, default: Any):
        """The member of a union that ``kind`` names; without ``kind``, the one in place."""
        tag = node.entries.get(KIND_KEY)
        if tag is None or (len(classes) == 1 and kind_of(classes[0]) is None):
            if len(classes) == 1:
                return classes[0]
            if type(default) in classes:
                return type(default)
            kinds = ", ".join(str(kind_of(c)) for c in classes)
            self.fail(node.origin, path, f"needs `kind`, one of: {kinds}")
            return None
        by_kind = {kind_of(c): c for c in classes}
        text = tag.text if isinstance(tag, Scalar) else _show(tag)
        if text in by_kind:
            self.origins[f"{path}.{KIND_KEY}"] = tag.origin
            return by_kind[text]
        names = [str(k) for k in by_kind]
        hint = did_you_mean(text, names)
        self.fail(
            tag.origin, path, f"unknown kind '{text}', expected one of: {', '.join(names)}{hint}"
        )
        return None

    def record_default(self, value: Any, path: str) -> None:
        self.origins[path] = DEFAULT
        for key, item in _children(value):
            self.record_default(item, f"{path}.{key}")


def _replaced(cls: Any, node: Mapping) -> set[str]:
    """Keys that are out of force because an alternative to them was set in a layer above."""
    alternatives: dict[str, tuple[str, ...]] = getattr(cls, "alternatives", {})

    def layer(key: str) -> int:  # defaults lie below all files
        return node.layers.get(key, 0) if key in node.entries else -1

    given = [head for head in alternatives if _is_set(node.entries.get(head))]
    replaced = set()
    for head, followers in alternatives.items():
        above = max((layer(other) for other in given if other != head), default=-1)
        replaced |= {key for key in (head, *followers) if layer(key) < above}
    return replaced


def _is_set(node: Node | None) -> bool:
    if isinstance(node, Sequence):
        return bool(node.items)
    return node is not None and not (
        isinstance(node, Scalar) and not node.quoted and node.text.lower() in _NULL
    )


def _standing(field: dataclasses.Field, instance: Any) -> Any:
    """The value of a field if nobody says anything."""
    if instance is not None:
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _show(node: Node) -> str:
    if isinstance(node, Scalar):
        return repr(node.text) if node.text or node.quoted else "nothing"
    return "a list" if isinstance(node, Sequence) else "a mapping"


def scalar(declared: Any, node: Scalar) -> Any:
    """The text of ``node`` as one scalar type, or a marker that it does not fit."""
    text, plain = node.text, not node.quoted
    is_null = plain and text.lower() in _NULL
    if declared is type(None):
        return None if is_null else _BAD
    if typing.get_origin(declared) is Literal:
        for choice in typing.get_args(declared):
            if scalar(type(choice), node) == choice:
                return choice
        return _BAD
    if declared is bool:
        return _BOOL.get(text.lower(), _BAD) if plain else _BAD
    if declared is int:
        return _to_int(text) if plain else _BAD
    if declared is float:
        return _to_float(text) if plain else _BAD
    if is_null and declared in (str, Path):
        # A plain `none` is a word; `null`, `~` and nothing at all say that there is no value.
        if text.lower() != "none":
            return _BAD
    if declared is str:
        return text
    if declared is Path:
        return local(text, "a path of the configuration")
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        return next((m for m in declared if str(m.value) == text), _BAD)
    return _BAD


def _to_int(text: str) -> Any:
    if _INT.fullmatch(text):
        return int(text)
    value = _to_float(text) if re.search(r"[.eE]", text) else _BAD  # 1e4 and 2.0 are whole numbers
    if value is not _BAD and math.isfinite(value) and value == int(value) and abs(value) < 2**53:
        return int(value)
    return _BAD


def _to_float(text: str) -> Any:
    lowered = text.lower()
    if lowered.lstrip("+-") in ("inf", ".inf") and len(text) - len(lowered.lstrip("+-")) <= 1:
        return -math.inf if text.startswith("-") else math.inf
    if not re.search(r"[0-9]", text) or not _FLOAT.fullmatch(text):
        return _BAD
    try:
        return float(text)
    except ValueError:
        return _BAD


# --- Validation ---------------------------------------------------------------------------------


def validate(config: Any, origins: dict[str, str] | None = None, path: str = "") -> None:
    """Call every ``validate()`` in the tree, innermost first.

    Raises:
      ConfigError: with the key path and, if ``origins`` is given, the place it came from.
    """
    for key, child in _children(config):
        validate(child, origins, f"{path}.{key}" if path else key)
    hook = getattr(config, "validate", None)
    if hook is None or not dataclasses.is_dataclass(config):
        return
    try:
        hook()
    except ValueError as error:
        origin = (origins or {}).get(path, DEFAULT)
        where = "" if origin == DEFAULT else f"{origin}: "
        raise ConfigError(f"{where}{path}: {error}" if path else f"{where}{error}") from error


def _children(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(name, getattr(value, name)) for name in schema(type(value))]
    if isinstance(value, tuple):
        return [(str(i), item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return list(value.items())
    return []


# --- From values to text ------------------------------------------------------------------------


def to_plain(config: Any) -> Any:
    """The configuration as dicts, lists and JSON scalars; tagged dataclasses carry ``kind``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = kind_of(type(config))
        head = {} if kind is None else {KIND_KEY: kind}
        return head | {key: to_plain(child) for key, child in _children(config)}
    if isinstance(config, tuple):
        return [to_plain(item) for item in config]
    if isinstance(config, dict):
        return {key: to_plain(item) for key, item in config.items()}
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"{type(config).__name__} is not a configuration type")


class _Dumper(yaml.SafeDumper):
    """Quotes the words that mean "no value" here but not in YAML 1.1, such as ``none``."""

    def represent_str(self, data: str) -> yaml.Node:
        node = super().represent_str(data)
        if data.lower() in _NULL:
            node.style = "'"
        return node


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(config: Any) -> str:
    """YAML text that :func:`parse_config` turns into an equal configuration."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _to_node(value: Any) -> Node:
    """A default value as a tree, so that flags can change parts of it."""
    return yaml_strict.relabel(yaml_strict.parse_yaml(to_yaml(value), DEFAULT), DEFAULT)


def config_hash(config: Any) -> str:
    """sha256 (hex) over the resolved values: equal configurations have equal hashes, however they
    were written (key order, file or flag, ``1e-3`` or ``0.001``)."""
    text = json.dumps(to_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def explain(config: Any, origins: dict[str, str]) -> str:
    """A table ``key = value  origin`` of every leaf, in the order of the schema."""
    rows: list[tuple[str, str, str]] = []

    def walk(value: Any, path: str) -> None:
        prefix = f"{path}." if path else ""
        if dataclasses.is_dataclass(value) and kind_of(type(value)):
            key = f"{prefix}{KIND_KEY}"
            rows.append((key, str(kind_of(type(value))), origins.get(key, DEFAULT)))
        children = _children(value)
        if not children and not dataclasses.is_dataclass(value):
            rows.append((path, json.dumps(to_plain(value)), origins.get(path, DEFAULT)))
        for key, child in children:
            walk(child, prefix + key)

    walk(config, "")
    left = max((len(f"{k} = {v}") for k, v, _ in rows), default=0)
    return "\n".join(f"{f'{k} = {v}':<{min(left, 72)}}  {origin}" for k, v, origin in rows)
