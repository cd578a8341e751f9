"""``step-jax tokenize [FILE.yaml ...] [--data.path PATH ...] [--out FILE.model]``."""

from __future__ import annotations

import argparse
import time

from step_jax.core.config import load_config


def main(argv: list[str]) -> int | None:
    from step_jax.data import TextDataset
    from step_jax.trainers.pretrain import PretrainConfig

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--out")
    own, rest = options.parse_known_args(argv)
    loaded = load_config(
        PretrainConfig,
        rest,
        prog="step-jax tokenize",
        description="Train or load the tokenizer of a pretraining configuration and tokenise its "
        "corpora, so that `step-jax pretrain` with the same `data` group starts at once. "
        "`--out FILE.model` also writes the tokenizer there.",
    )
    start = time.perf_counter()
    dataset = TextDataset.build(loaded.config.data, batch_size=1, report=print)
    seconds = time.perf_counter() - start
    print(table(dataset))
    print(f"{seconds:.1f} s; cache: {loaded.config.data.cache_path}")
    if own.out:
        dataset.tokenizer.save(own.out)
        print(f"tokenizer written to {own.out}")
    return None


def table(dataset) -> str:
    """The counters of a dataset, one a line, and the tokenizer's identity."""
    counters = dataset.counters()
    rows = [(name.replace("_", " "), f"{value:,}") for name, value in counters.items()]
    per_token = counters["bytes"] / max(1, counters["tokens"])
    rows += [
        ("bytes per token", f"{per_token:.3f}"),
        ("tokenizer pieces", f"{dataset.tokenizer.vocab_size:,}"),
        ("tokenizer hash", dataset.tokenizer.hash[:16]),
        *(("left out, by name", str(path)) for path in dataset.skipped_paths),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
