"""A config.json read key by key: every value has its type, and no key is passed over.

A family asks for its keys through ``Keys``, which remembers them. What is left over in the end must
be null or known to be without effect on what the model computes: anything else may change it, and
is an error by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from step_jax.core.errors import ConfigError

#: Keys of no effect on the function: names, files, how the library runs or trains or samples.
WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
    _name_or_path architectures attn_implementation auto_map begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id dtype eos_token_id experts_implementation
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    label2id max_position_embeddings model_type name_or_path num_labels output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype
    torchscript transformers_version use_bfloat16 use_cache
    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    temperature top_k top_p typical_p
    """.split()
)

REQUIRED = object()


class Keys:
    """The keys of a config.json, or of a table in it.

    ``problems`` collects what is asked for and cannot be had, to be reported at once; a value of
    the wrong type is reported when it is read.
    """

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[str] | None = None):
        self.values = dict(values)
        self.where = where
        self.problems: list[str] = [] if problems is None else problems
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is; ``default`` where there is none, or null."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            what = f"has no value for {name!r}" if name in self.values else f"lacks {name!r}"
            raise ConfigError(f"{self.where} {what}")
        return default if value is None else value

    def _typed(self, name: str, default: Any, fits, what: str) -> Any:
        value = self.get(name, default)
        if value is not default and not fits(value):
            raise ConfigError(f"{self.where} has {name} {value!r}; it must be {what}")
        return value

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1) -> Any:
        def fits(x):
            return isinstance(x, int) and not isinstance(x, bool) and x >= least

        return self._typed(name, default, fits, f"an integer of at least {least}")

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number that is not negative."""
        value = self._typed(name, default, _is_number, "a number of at least 0")
        return float(value) if value is not default else value

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, lambda x: isinstance(x, bool), "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, lambda x: isinstance(x, str), "a text")

    def integers(self, name: str) -> list[int] | None:
        """A list of indices, or None."""

        def fits(x):
            return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)

        return self._typed(name, None, fits, "a list of integers of at least 0")

    def table(self, name: str, default: Any = None) -> Keys:
        """The table under a key, empty where there is none."""
        value = self._typed(name, default, lambda x: isinstance(x, Mapping), "a table of keys")
        return Keys(value or {}, f"{self.where}, {name},", self.problems)

    def per_layer(self, name: str, depth: int, fits, what: str, default: Any = None) -> list:
        """A value for every layer: from a list, which may go on with later layers, or one for all.

        Raises:
          ConfigError: too short a list, or a value that does not fit.
        """
        value = self.get(name)
        if value is None:
            return [default] * depth
        values = value[:depth] if isinstance(value, list) else [value] * depth
        if len(values) < depth:
            raise ConfigError(
                f"{self.where}: {name} names {len(values)} layers, num_hidden_layers is {depth}"
            )
        if wrong := [v for v in values if v is not None and not fits(v)]:
            raise ConfigError(f"{self.where} has {wrong[0]!r} in {name}; each must be {what}")
        return [default if v is None else v for v in values]

    def numbers_per_layer(self, name: str, depth: int, default: Any = None) -> list:
        values = self.per_layer(name, depth, _is_number, "a number of at least 0", default)
        return [v if v is default else float(v) for v in values]

    def one_of(self, names: tuple[str, ...], read, *args) -> Any:
        """``read(name, *args)`` of the one quantity that several names stand for.

        Raises:
          ConfigError: names with unlike values.
        """
        given = {name: self.get(name) for name in names if name in self}
        if any(value != next(iter(given.values())) for value in given.values()):
            both = " but ".join(f"{name} {value!r}" for name, value in given.items())
            raise ConfigError(f"{self.where} has {both}: which are names for the same thing")
        if not given and not args:
            raise ConfigError(f"{self.where} lacks {' or '.join(map(repr, names))}")
        return read(next(iter(given), names[0]), *args)

    def only(self, **allowed: Any) -> None:
        """Keys that may be missing but may not have another value."""
        for name, value in allowed.items():
            found = self.get(name)
            if found is not None and found != value:
                self.unsupported(f"{name} {found!r} (only {value!r})")

    def without_effect(self, *names: str) -> None:
        self._read.update(names)

    def unsupported(self, what: str) -> None:
        self.problems.append(what)

    def note_unread(self, harmless: frozenset[str] = frozenset()) -> None:
        """Takes down the keys that nobody asked for."""
        for name, value in self.values.items():
            if value is not None and name not in self._read and name not in harmless:
                self.unsupported(f"{name} {value!r} (a key of no known meaning)")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= 0
