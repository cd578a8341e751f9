"""``step-jax eval RUN [--data.path PATH] ...``: loss, perplexity and bits per byte of a model."""

from __future__ import annotations

from dataclasses import dataclass

from step_jax.cli.arguments import run_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.config import Format

_DESCRIPTION = """Score the model of a run: step-jax eval RUN [--data.path PATH] ...
RUN is a run directory or one of its checkpoints/STEP. Without --data.path, the documents that the
run held out are scored; with it, every document of that file or folder."""


@dataclass(frozen=True)
class Text:
    """What to score instead of the run's held-out documents.

    path: a file or folder, all of it.
    format, text_field: as for training.
    """

    path: str | None = None
    format: Format = "auto"
    text_field: str = "text"


@dataclass(frozen=True)
class EvaluateConfig:
    """How to score.

    batch_size: rows of a batch.
    step: the checkpoint to use; the newest verified one by default.
    """

    data: Text = Text()
    batch_size: int = 16
    step: int | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")


def main(argv: list[str]) -> None:
    run, options = run_and_options(argv, "step-jax eval")
    config = load_config(
        EvaluateConfig, options, prog="step-jax eval RUN", description=_DESCRIPTION
    ).config

    from step_jax.checkpoint.load import load_model
    from step_jax.evaluation.heldout import make_evaluator

    sharding = Sharding.build(config.parallel)
    trained = load_model(run, sharding, config.step)
    heldout, left_out = _text(config, trained, run)
    rows = -(-config.batch_size // sharding.ways("batch")) * sharding.ways("batch")
    evaluate = make_evaluator(
        trained.decoder, trained.execution, sharding, rows, trained.data.sequence_length
    )
    figures = evaluate(trained.params, heldout)
    if heldout.lossy:
        bits = [("bits per byte", f"not available: the tokenizer loses text ({heldout.lossy})")]
    else:
        baselines = heldout.compressed_bits_per_byte().items()
        bits = [("bits per byte", f"{figures['bits_per_byte']:.4f}")]
        bits += [(f"bits per byte, {name}", f"{value:.4f}") for name, value in baselines]
    table = [
        ("run", f"{run}, step {trained.step}"),
        ("text", config.data.path or "held-out documents of the run"),
        ("documents", f"{heldout.documents:,}" + (f" ({left_out} left out)" if left_out else "")),
        ("bytes", f"{heldout.bytes:,}"),
        ("tokens", f"{figures['tokens']:,.0f}"),
        ("nll (nats per token)", f"{figures['nll']:.4f}"),
        ("perplexity", f"{figures['perplexity']:.3f}"),
        *bits,
    ]
    width = max(len(name) for name, _ in table)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in table))


def _text(config: EvaluateConfig, trained, run: str):
    """(documents to score, how many things were left out)."""
    from dataclasses import replace

    from step_jax.checkpoint.load import run_directory_of
    from step_jax.data import DataConfig, Heldout, prepare
    from step_jax.evaluation.corpus import whole_corpus

    if config.data.path is not None:
        data = DataConfig(
            path=config.data.path, format=config.data.format, text_field=config.data.text_field
        )
        heldout, skips = whole_corpus(data, trained.tokenizer)
        return heldout, len(skips)
    tokenizer = str(run_directory_of(run)[0] / "tokenizer")
    caches = prepare(replace(trained.data, tokenizer=tokenizer)).caches
    return Heldout.of(caches, trained.tokenizer), 0
