"""``step-jax tokenize [FILE.yaml ...] [--data.path PATH ...] [--workers N] [--out FOLDER]``."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from step_jax.cli.arguments import loop_of
from step_jax.core.command_line import load_config, split
from step_jax.core.errors import ConfigError, DataError
from step_jax.data import DataConfig, TextDataset
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers import DEFAULT, find_loop

_DESCRIPTION = (
    "Train or load a tokenizer and tokenise the corpora, so that a run of the same recipe starts "
    "at once. Takes the recipe of a loop that reads text, conversations or judged answers as "
    "FILE.yaml, or only --data flags. When it is killed, the same command goes on; several hosts "
    "with a common data.cache_dir share the work; what is there already is checked, every byte. "
    "`--workers N` processes tokenise, one for each core by default. `--out FOLDER` also writes "
    "the tokenizer there."
)


@dataclass(frozen=True)
class DataOnly:
    """What `step-jax tokenize` reads when no pretraining configuration is given."""

    data: DataConfig = DataConfig()


class Asked(NamedTuple):
    """What a command line says.

    config: of a loop, or a `DataOnly`.
    workers: processes that tokenise; None for one a core.
    out: where to write the tokenizer.
    """

    config: Any
    workers: int | None = None
    out: str | None = None


def parse(argv: list[str]) -> Asked:
    options, argv = _own_options(argv)
    schema: type[Any] = _schema(argv)
    loaded = load_config(schema, argv, prog="step-jax tokenize", description=_DESCRIPTION)
    return Asked(loaded.config, *options)


def run(asked: Asked) -> None:
    from step_jax.trainers.ahead import prepare_ahead

    start = time.perf_counter()
    dataset = prepare_ahead(asked.config, functools.partial(print, flush=True), asked.workers)
    print(table(dataset))
    print(sample_chat(dataset.tokenizer), end="")
    cache = dataset.config.cache_path
    print(f"{time.perf_counter() - start:.1f} s; cache, every byte checked: {cache}")
    if asked.out:
        dataset.tokenizer.save(asked.out)
        print(f"tokenizer written to {asked.out}")


def _own_options(argv: list[str]) -> tuple[tuple[int | None, str | None], list[str]]:
    import argparse

    options = argparse.ArgumentParser(prog="step-jax tokenize", add_help=False, allow_abbrev=False)
    options.add_argument("--workers")
    options.add_argument("--out")
    own, rest = options.parse_known_args(argv)
    if own.workers is None:
        return (None, own.out), rest
    if not own.workers.isdecimal() or int(own.workers) < 1:
        raise ConfigError(f"--workers is {own.workers}; it must be a number of at least 1")
    return (int(own.workers), own.out), rest


def _schema(argv: list[str]) -> type:
    line = split(argv)
    if not line.files:
        return DataOnly
    loop = find_loop(loop_of(line.files, argv) or DEFAULT)
    if "data" not in {field.name for field in fields(loop.Config)}:
        raise ConfigError(f"{line.files[-1]} is a recipe of a loop that reads no text")
    return loop.Config


def table(dataset: TextDataset) -> str:
    """The counters of a dataset, one a line, and the tokenizer's identity."""
    counters = dataset.counters()
    rows = [(name.replace("_", " "), f"{value:,}") for name, value in counters.items()]
    per_token = counters["bytes"] / max(1, counters["tokens"])
    rows += [
        ("bytes per token", f"{per_token:.3f}"),
        *_about(dataset.tokenizer),
        *(("left out, by name", str(path)) for path in dataset.skipped_paths),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _about(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    texts = {i: text for text, i in tokenizer.special.items()}

    def shown(i: int | None) -> str:
        return "none" if i is None else f"{i} {texts.get(i, '')}".rstrip()

    return [
        ("tokenizer tokens", f"{tokenizer.vocab_size:,}"),
        ("tokenizer hash", tokenizer.hash[:16]),
        ("gives back any text", f"no: {tokenizer.lossy}" if tokenizer.lossy else "yes"),
        ("begin of text", shown(tokenizer.bos_id)),
        ("before a text", ", ".join(map(shown, tokenizer.prefix_ids)) or "nothing"),
        ("end of text", shown(tokenizer.eos_id)),
        ("padding", shown(tokenizer.pad_id)),
        ("stop tokens", ", ".join(map(shown, tokenizer.stop_ids)) or "none"),
        ("special tokens", _few([f"{i} {text}" for i, text in sorted(texts.items())])),
        ("chat template", "none" if tokenizer.chat_template is None else "see below"),
    ]


def _few(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more


def sample_chat(tokenizer: Tokenizer) -> str:
    """A conversation as the tokenizer's template writes it, or why it cannot; empty without one."""
    if tokenizer.chat_template is None:
        return ""
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    try:
        text = tokenizer.chat_template.render(messages, add_generation_prompt=True)
    except DataError as error:
        return f"--- chat template\n{error}\n"
    return f"--- chat template, of a sample\n{text}\n---\n"
