"""Command-line flags as a tree over the configuration files.

A flag is a key path: ``--optimizer.peak-lr 3e-4`` is the line ``peak_lr: 3e-4`` under
``optimizer:``, converted by the same code with the same messages. So ``--model.layers.0.repeat 4``
reaches into lists and ``--optimizer.kind muon`` changes the member of a union, which a parser that
is built from the default value cannot do. tyro draws the ``--help`` page from the same schema.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import numbers
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_jax.core import config, yaml_strict
from step_jax.core.errors import ConfigError
from step_jax.core.text import is_utf8, printable
from step_jax.core.yaml_strict import (
    COMMAND_LINE,
    DEFAULT,
    Mapping,
    Node,
    Scalar,
    Sequence,
    did_you_mean,
)


def load_config[T](
    cls: type[T],
    argv: Iterable[object],
    *,
    prog: str = "step-jax",
    description: str | None = None,
) -> config.Loaded[T]:
    """The configuration that files and flags describe.

    Args:
      cls: the schema, a dataclass.
      argv: YAML files (later ones win), then ``--key.sub-key value`` flags. ``--help`` prints every
        flag with the file's values as defaults; ``--explain`` prints every value with its origin.
        A value may be a Python one: a number, boolean, None, path, list or dictionary of these.
      prog: the command, for messages.
      description: the first paragraph of ``--help`` (default: the docstring of ``cls``).

    Raises:
      ConfigError: anything wrong with the files, the flags or the values.
      SystemExit: after ``--help`` and ``--explain``.
    """
    line = split([as_word(word) for word in argv])
    tree: Node = Mapping({}, {}, DEFAULT)
    for file in line.files:
        tree = yaml_strict.merge(tree, yaml_strict.load_yaml(Path(file)))
    if line.help:
        print_help(cls, tree, prog=prog, description=description)
        raise SystemExit(0)
    overrides = to_tree(cls, line.flags)
    tree = yaml_strict.merge(tree, overrides)
    try:
        loaded = config.from_tree(cls, tree, check=not line.explain)
    except ConfigError as error:
        if line.files:
            raise
        raise ConfigError(f"{error}\n(no configuration file was given to `{prog}`)") from None
    if line.explain:
        print(loaded.explain())
        config.validate(loaded.config, loaded.origins)
        raise SystemExit(0)
    return loaded


def as_word(value: object) -> str:
    """A word of a command line for a Python value.

    Raises:
      ConfigError: there is none, or the text holds bytes that are not UTF-8.
    """
    value = _plain(value)
    if isinstance(value, str):
        word = value
    elif isinstance(value, float):
        word = repr(value)  # JSON writes infinities in a way of its own
    else:
        word = json.dumps(value, default=_plain, ensure_ascii=False)
    if not is_utf8(word):
        raise ConfigError(
            f"{COMMAND_LINE}: {printable(word)!r} is not UTF-8 text and cannot be kept with a run. "
            "Rename the file or folder, or write the text as UTF-8"
        )
    return word


def _plain(value: object) -> object:
    """A value as one that JSON knows. Raises ConfigError if there is none."""
    if value is None or isinstance(value, str | bool | list | tuple | dict):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Integral):  # numpy's numbers are registered as these
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ConfigError(
        f"{COMMAND_LINE}: {value!r} is {type(value).__name__}; an option takes text, a number, "
        "a boolean, None, a path, or a list or dictionary of these"
    )


@dataclass(frozen=True)
class Line:
    """A command line: files, then flags with the words that follow each."""

    files: list[str]
    flags: list[tuple[str, list[str]]]
    help: bool
    explain: bool


def split(argv: list[str]) -> Line:
    """Sort the words of a command line. Raises ConfigError for a short option."""
    files: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    wants = {"--help": False, "--explain": False}
    for word in argv:
        if word == "-h":
            word = "--help"
        if word in wants:
            wants[word] = True
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        elif word.startswith("-") and len(word) > 1:
            raise ConfigError(f"unknown option {word}: flags are written --group.key VALUE")
        else:
            files.append(word)
    return Line(files, flags, wants["--help"], wants["--explain"])


def to_tree(cls: type, flags: list[tuple[str, list[str]]]) -> Node:
    """The flags as a patch that :func:`yaml_strict.merge` lays over the files.

    Of a flag that is given several times the last one counts; of a list of any length they count
    together (``--prompt A --prompt B``), unless the last is empty.

    Raises:
      ConfigError: an unknown flag (with the nearest known one), or a flag without a value.
    """
    tree: Node = _patch({})
    lists: dict[tuple[str, ...], Sequence] = {}
    for name, words in flags:
        keys, declared, negated = _resolve(cls, name)
        node = _value(name, words, declared, negated)
        if isinstance(node, Sequence) and any(Ellipsis in typing.get_args(d) for d in declared):
            before = lists.get(tuple(keys), Sequence((), COMMAND_LINE))
            node = replace(node, items=(*before.items, *node.items) if node.items else ())
            lists[tuple(keys)] = node
        for key in reversed(keys):
            node = _patch({key: node})
        tree = yaml_strict.merge(tree, node)
    return tree


def _patch(entries: dict[str, Node]) -> Mapping:
    return Mapping(entries, dict.fromkeys(entries, COMMAND_LINE), COMMAND_LINE, patch=True)


def _resolve(cls: type, name: str) -> tuple[list[str], tuple[Any, ...], bool]:
    """Keys of a flag, the types it may hold, and whether it was written ``--group.no-key``."""
    types: tuple[Any, ...] = (cls,)
    keys: list[str] = []
    segments = name.split(".")
    for position, segment in enumerate(segments):
        key, found = _descend(types, segment)
        is_last = position == len(segments) - 1
        if not found and is_last and segment.startswith("no-"):
            key, found = _descend(types, segment[3:])
            if bool in found:
                return [*keys, key], found, True
        if not found:
            known = _flag_names(cls)
            leaf = segments[-1].replace("_", "-")
            same_leaf = [flag for flag in known if flag[2:].split(".")[-1] == leaf]
            hint = did_you_mean(f"--{name}".replace("_", "-"), same_leaf or known)
            if same_leaf and not hint:
                hint = f"; did you mean '{same_leaf[0]}'?"
            raise ConfigError(f"{COMMAND_LINE}: unknown option --{name}{hint}")
        keys.append(key)
        types = found
    return keys, types, False


def _descend(types: tuple[Any, ...], segment: str) -> tuple[str, tuple[Any, ...]]:
    """The key that ``segment`` names in any of ``types``, and the types it can hold."""
    found: list[Any] = []
    key = segment
    for declared in types:
        origin, args = typing.get_origin(declared), typing.get_args(declared)
        if dataclasses.is_dataclass(declared) and isinstance(declared, type):
            name = segment.replace("-", "_")
            hints = config.schema(declared)
            if name in hints or (name == yaml_strict.KIND_KEY and config.kind_of(declared)):
                key = name
                found += config.members(hints.get(name, str))
        elif origin is dict:
            found += config.members(args[1])
        elif origin is tuple and segment.isdecimal():
            index = 0 if len(args) == 2 and args[1] is Ellipsis else int(segment)
            found += config.members(args[index]) if index < len(args) else ()
    return key, tuple(dict.fromkeys(found))


def _value(name: str, words: list[str], declared: tuple[Any, ...], negated: bool) -> Node:
    holds_tuple = any(typing.get_origin(d) is tuple for d in declared)
    holds_group = any(dataclasses.is_dataclass(d) or typing.get_origin(d) is dict for d in declared)
    if negated or (not words and bool in declared):
        if words:
            raise ConfigError(f"{COMMAND_LINE}: --{name} takes no value, got {' '.join(words)}")
        return Scalar("false" if negated else "true", False, COMMAND_LINE)
    if len(words) == 1 and (holds_tuple or holds_group) and words[0][:1] in ("[", "{"):
        tree = yaml_strict.parse_yaml(words[0], f"--{name}")
        return yaml_strict.relabel(tree, COMMAND_LINE)
    if holds_tuple and len(words) != 1 or holds_tuple and len(declared) == 1:
        return Sequence(tuple(Scalar(w, False, COMMAND_LINE) for w in words), COMMAND_LINE)
    if not words:
        raise ConfigError(f"{COMMAND_LINE}: --{name} needs a value")
    if len(words) % 2 == 0 and any(typing.get_origin(d) is dict for d in declared):
        values = [Scalar(w, False, COMMAND_LINE) for w in words[1::2]]
        keys = dict(zip(words[::2], values, strict=True))
        return Mapping(dict(keys), dict.fromkeys(keys, COMMAND_LINE), COMMAND_LINE)
    if len(words) > 1:
        extra = " ".join(words[1:])
        raise ConfigError(
            f"{COMMAND_LINE}: --{name} takes one value; what is '{extra}'? "
            "(files stand before the flags; quote a value with spaces)"
        )
    # an empty value is null, as in a file; where null is none of the values it is an empty text
    empty = not words[0] and str in declared and type(None) not in declared
    return Scalar(words[0], empty, COMMAND_LINE)


def _flag_names(cls: type) -> list[str]:
    """Every flag of a schema, for suggestions; list items are shown as item 0."""
    names: list[str] = []

    def walk(declared: Any, prefix: str) -> None:
        for part in config.members(declared):
            args = typing.get_args(part)
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                fields: dict[str, Any] = dict(config.schema(part))
                if config.kind_of(part):
                    fields[yaml_strict.KIND_KEY] = str
                for key, hint in fields.items():
                    name = f"{prefix}.{key}" if prefix else key
                    names.append("--" + name.replace("_", "-"))
                    walk(hint, name)
            elif typing.get_origin(part) is tuple and args:
                walk(args[0], f"{prefix}.0")

    walk(cls, "")
    return list(dict.fromkeys(names))


def _groups(cls: type) -> list[type]:
    """Every dataclass that a schema can hold, itself included."""
    found: dict[type, None] = {}

    def walk(declared: Any) -> None:
        for part in config.members(declared):
            if dataclasses.is_dataclass(part) and isinstance(part, type) and part not in found:
                found[part] = None
                for hint in config.schema(part).values():
                    walk(hint)
            for argument in (
                typing.get_args(part) if typing.get_origin(part) in (tuple, dict) else ()
            ):
                walk(argument)

    walk(cls)
    return list(found)


def _sectioned(cls: type) -> str:
    """The docstring with its ``field: text`` lines under ``Attributes:``, as tyro wants them."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    starts = tuple(f"{name}: " for name in config.schema(cls))
    first = next((i for i, line in enumerate(lines) if line.startswith(starts)), None)
    if first is None:
        return cls.__doc__ or ""
    return "\n".join([*lines[:first], "", "Attributes:", *("  " + line for line in lines[first:])])


def print_help(cls: type, tree: Node, *, prog: str, description: str | None) -> None:
    """Print every flag with its type, documentation and value from the files."""
    import tyro

    def placeholder(declared: Any) -> Any:
        for part in config.members(declared):
            if typing.get_origin(part) is tuple:  # tyro lists a tuple of groups by its items
                return ()
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                return config.with_placeholders(part, Mapping({}, {}, DEFAULT), placeholder)
        return tyro.MISSING

    for group in _groups(cls):
        group.__doc__ = _sectioned(group)
    default: Any = config.with_placeholders(cls, tree, placeholder)
    text = (description or cls.__doc__ or "").strip()
    text += (
        "\n\nA YAML file gives the values, flags change them: "
        f"{prog} FILE.yaml --group.key VALUE. --explain prints every value and where it came from. "
        "Items of lists are reached by index (--model.layers.0.repeat 4), members of a union by "
        "--group.kind NAME."
    )
    tyro.cli(  # prints and raises SystemExit(0)
        cls,
        default=default,
        prog=f"{prog} [FILE.yaml ...]",
        description=text,
        args=["--help"],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
