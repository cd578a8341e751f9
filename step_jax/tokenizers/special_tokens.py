"""What the files beside a tokenizer say of its special tokens and its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from step_jax.core.errors import DataError

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """What the configuration files beside a tokenizer say.

    Attributes:
      named: role (``bos_token``, ...) -> the token's text.
      added: text -> (id, attributes) of tokens that the configuration adds.
      ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of the generation configuration,
        each a list.
      template: the source of the chat template.
      adds_bos: whether a text begins with bos; None where ``tokenizer_config.json`` does not say.
    """

    named: Mapping[str, str]
    added: Mapping[str, tuple[int, dict[str, Any]]]
    ids: Mapping[str, list[int]]
    template: str | None
    adds_bos: bool | None

    @classmethod
    def read(cls, files: Mapping[str, bytes], name: str) -> SpecialTokens:
        """Raises `DataError` naming file and key of what is damaged or not understood."""

        def load(file: str) -> dict[str, Any]:
            return parse_object(files[file], f"{name}, {file}") if file in files else {}

        config, generation = load("tokenizer_config.json"), load("generation_config.json")
        tokens = load("special_tokens_map.json") | config
        named = {
            role: content
            for role in _NAMED
            if (content := _content(tokens.get(role), f"{name}, {role}")) is not None
        }
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise DataError(f"{name}, tokenizer_config.json: added_tokens_decoder is no object")
        added = {}
        for key, value in decoder.items():
            where = f"{name}, tokenizer_config.json, added_tokens_decoder.{key}"
            content = _content(value, where)
            if content is None or not key.isdecimal():
                raise DataError(f"{where} is {value!r}; it must be a token under its id")
            added[content] = (int(key), value if isinstance(value, dict) else {})
        ids = {
            key: _ids(generation[key], f"{name}, generation_config.json, {key}")
            for key in _IDS
            if generation.get(key) is not None
        }
        adds_bos = config.get("add_bos_token")
        if adds_bos is not None and not isinstance(adds_bos, bool):
            raise DataError(
                f"{name}, tokenizer_config.json: add_bos_token is {adds_bos!r}; it must be true or "
                "false"
            )
        template = _template(files, config, load("chat_template.json"), name)
        return cls(named, added, ids, template, adds_bos)

    def id_of(
        self, role: str, token_to_id: Callable[[str], int | None], name: str, default: int | None
    ) -> int | None:
        """Id of ``bos``, ``eos`` or ``pad``: by its text, by the generation configuration, or else
        ``default``. Raises `DataError` for a text that is no token."""
        text = self.named.get(f"{role}_token")
        if text is None:
            return next(iter(self.ids.get(f"{role}_token_id", [])), default)
        found = token_to_id(text)
        if found is None:
            raise DataError(
                f"{name}: the configuration names {text!r} as {role}_token, but the tokenizer has "
                "no such token; the files are not of one tokenizer"
            )
        return found

    def stops(self, eos_id: int | None, vocab_size: int, name: str) -> tuple[int, ...]:
        """All tokens that end a text, eos first. Raises `DataError` for ids beyond the tokens."""
        ids = [] if eos_id is None else [eos_id]
        ids = list(dict.fromkeys([*ids, *self.ids.get("eos_token_id", [])]))
        if beyond := [i for i in ids if i >= vocab_size]:
            raise DataError(
                f"{name}, generation_config.json (or else config.json): eos_token_id {beyond[0]} "
                f"is beyond the tokenizer's {vocab_size} tokens"
            )
        return tuple(ids)


def generation_of(content: bytes, where: str) -> dict[str, bytes]:
    """The generation configuration that a model's ``config.json`` stands for, if it names tokens.

    Of a model that also sees, the language model's own keys (``text_config``) fill in.
    """
    config = parse_object(content, where)
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    found = {key: inner.get(key) if config.get(key) is None else config[key] for key in _IDS}
    ids = {k: _ids(v, f"{where}, {k}") for k, v in found.items() if v is not None}
    return {"generation_config.json": json.dumps(ids).encode()} if ids else {}


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object; raises `DataError` saying where it breaks."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError too
        raise DataError(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}; it must be a JSON object")
    return value


def _content(value: Any, where: str) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and (not isinstance(text, str) or not text):
        raise DataError(f"{where} is {value!r}; it must be a token's text")
    return text


def _ids(value: Any, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if bad := [i for i in ids if type(i) is not int or i < 0]:
        raise DataError(f"{where} has {bad[0]!r}; it must be token ids")
    return ids


def _template(files, config: dict[str, Any], legacy: dict[str, Any], name: str) -> str | None:
    """Source of the template: its own file, the older JSON file, or a key of the configuration."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{name}, chat_template.jinja is not UTF-8: {error}") from error
    value = legacy.get("chat_template", config.get("chat_template"))
    if isinstance(value, list):  # several by name
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
        if value is None:
            raise DataError(f"{name}: chat_template has {sorted(map(str, named))}, no `default`")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name}: chat_template is a {type(value).__name__}; it must be text")
    return value
