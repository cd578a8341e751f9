"""Hugging Face: ``tokenizer.json`` through the `tokenizers` package, ids and text its own."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from step_jax.core.digest import digest
from step_jax.core.errors import ConfigError, DataError
from step_jax.tokenizers.base import SPACE_MARK, Tokenizer
from step_jax.tokenizers.special_tokens import SpecialTokens, parse_object
from step_jax.tokenizers.template import ChatTemplate


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` with the configuration beside it; see `Tokenizer`.

    Without configuration it has no bos, eos, pad or template: ``tokenizer.json`` says which tokens
    are special, not what for.
    """

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer"):
        """Reads the files of a folder; raises `DataError` for what is damaged or does not fit."""
        self.name, self.files = name, dict(files)
        self._json = parse_object(files["tokenizer.json"], f"{name}, tokenizer.json")
        tokens = SpecialTokens.read(files, name)
        self._added = tokens.added
        self._tokenizer = self._build(special=False)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        to_id = self._tokenizer.token_to_id
        self.bos_id = tokens.id_of("bos", to_id, name, None)
        self.eos_id = tokens.id_of("eos", to_id, name, None)
        pad = tokens.id_of("pad", to_id, name, None)
        self.pad_id = 0 if pad is None else pad
        self.prefix_ids = self._prefix(tokens)
        self.stop_ids = tokens.stops(self.eos_id, self.vocab_size, name)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.hash = digest(
            files["tokenizer.json"],
            [sorted((i, content) for content, (i, _) in self._added.items())],
            self._borders(),
        )
        self.chat_template = ChatTemplate.of(tokens.template, tokens.named, name)

    def _prefix(self, tokens: SpecialTokens) -> tuple[int, ...]:
        """What stands before a text: bos or not, where ``tokenizer_config.json`` says so, or else
        what the template of ``tokenizer.json`` has there."""
        if tokens.adds_bos is not None:
            return (self.bos_id,) if tokens.adds_bos and self.bos_id is not None else ()
        ids: list[int] = []
        for part in _flat(self._json.get("post_processor"), "processors"):
            if part.get("type") == "TemplateProcessing":
                before = itertools.takewhile(lambda x: "SpecialToken" in x, part["single"])
                names = [item["SpecialToken"]["id"] for item in before]
                ids += [i for name in names for i in part["special_tokens"][name]["ids"]]
        return tuple(ids)

    def _build(self, special: bool):
        """The package's tokenizer; ``special``: reads special tokens written out in a text."""
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{self.name}, tokenizer.json is no tokenizer: {error}") from error
        if not tokenizer.get_vocab_size(with_added_tokens=True):
            raise DataError(f"{self.name}, tokenizer.json has no tokens")
        tokenizer.no_truncation()  # files of fine-tuned models often keep that of their training
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for content, (i, options) in sorted(self._added.items(), key=lambda item: item[1][0]):
            if tokenizer.token_to_id(content) is None:
                options = {key: bool(options[key]) for key in keys if key in options}
                tokenizer.add_tokens([tokenizers.AddedToken(content, **options)])
            if tokenizer.token_to_id(content) != i:
                raise DataError(
                    f"{self.name}: {content!r} is token {i} in tokenizer_config.json and "
                    f"{tokenizer.token_to_id(content)} in tokenizer.json; the files are not of one "
                    "tokenizer"
                )
        return tokenizer

    @functools.cached_property
    def _reading_special(self):
        return self._build(special=True)

    def _encode(self, texts: Sequence[str], special: bool) -> list[np.ndarray]:
        tokenizer = self._reading_special if special else self._tokenizer
        try:
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(self._refusal(texts, error)) from error
        return [np.array(e.ids, np.int32) for e in encoded]

    def _encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoded = self._reading_special.encode(text, add_special_tokens=False)
        except Exception as error:
            raise DataError(self._refusal([text], error)) from error
        return np.array(encoded.ids, np.int32), np.array(encoded.offsets, np.int32).reshape(-1, 2)

    def _refusal(self, texts: Sequence[str], error: Exception) -> str:
        """Names the first character that alone is refused as well."""
        for text in texts:
            for place, character in enumerate(text):
                try:
                    self._tokenizer.encode(character, add_special_tokens=False)
                except Exception:
                    near = text[max(0, place - 20) : place + 20]
                    return (
                        f"{self.name} has no token for {character!r} (character {place} of "
                        f"{near!r}), nor one for what is unknown"
                    )
        return f"{self.name} cannot encode the text: {error}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _declared_loss(self) -> str | None:
        for part in _flat(self._json.get("normalizer"), "normalizers"):
            # NFC is `as_read`; "Replace" and "Prepend" write a space as the mark, and probes tell
            # whether the decoder undoes it.
            replaces_space = part.get("pattern") == {"String": " "}
            kind = part.get("type")
            if kind in ("NFC", "Prepend") or (
                kind == "Replace" and replaces_space and part.get("content") == SPACE_MARK
            ):
                continue
            return f"its normaliser {kind} changes the text before it is read"
        return None


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or post-processor, sequences opened."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part.get(key, []) for step in _flat(inner, key)]


def character_tokenizer(symbols: Sequence[str], end: str | None = None) -> HuggingFaceTokenizer:
    """A closed vocabulary: the i-th symbol is token i, and nothing else can be written.

    Texts with another character are refused. ``end`` names a token after the symbols that ends a
    text (eos); there is no bos or pad.

    Raises:
      ConfigError: a symbol that is not one character, or stands twice.
    """
    if bad := [s for s in symbols if len(s) != 1]:
        raise ConfigError(f"symbol {bad[0]!r} has {len(bad[0])} characters; every symbol is one")
    if twice := [s for i, s in enumerate(symbols) if s in symbols[:i]]:
        raise ConfigError(f"symbol {twice[0]!r} stands twice among the symbols of a tokenizer")
    if not symbols:
        raise ConfigError("a tokenizer needs at least one symbol")
    import tokenizers

    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    any_character = tokenizers.Regex(r"[\s\S]")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(any_character, "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    files = {}
    if end is not None:
        made.add_special_tokens([tokenizers.AddedToken(end, special=True)])
        files["tokenizer_config.json"] = json.dumps({"eos_token": end}).encode()
    content = json.dumps(json.loads(made.to_str()), ensure_ascii=False, indent=1)
    return HuggingFaceTokenizer({"tokenizer.json": content.encode(), **files}, "symbols")
