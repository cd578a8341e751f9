"""``step-jax eval ARTIFACT [--data.path PATH] ...``: loss, perplexity and bits per byte."""

from __future__ import annotations

from dataclasses import dataclass

from step_jax.cli.arguments import artifact_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.config import Format

_DESCRIPTION = """Score a language model: step-jax eval ARTIFACT [--data.path PATH] ...
ARTIFACT is RUN, RUN@STEP or hf:PATH. Without --data.path, the documents that the run held out and
keeps are scored; with it, every document of that file or folder."""


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
    part: which of the artifact's models; its first by default.
    """

    data: Text = Text()
    batch_size: int = 16
    part: str | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")


def parse(argv: list[str]) -> tuple[str, EvaluateConfig]:
    """(the artifact's name, what to do with it)."""
    name, options = artifact_and_options(argv, "step-jax eval")
    loaded = load_config(
        EvaluateConfig, options, prog="step-jax eval ARTIFACT", description=_DESCRIPTION
    )
    return name, loaded.config


def run(asked: tuple[str, EvaluateConfig]) -> None:
    name, config = asked

    from step_jax.evaluation.heldout import make_evaluator
    from step_jax.interop.artifacts import load_artifact
    from step_jax.models.text.decoder import Decoder

    sharding = Sharding.build(config.parallel)
    artifact = load_artifact(name, sharding, config.part)
    model = artifact.require(Decoder, "step-jax eval")
    heldout, left_out = _text(config, artifact)
    rows = -(-config.batch_size // sharding.ways("batch")) * sharding.ways("batch")
    evaluate = make_evaluator(model, artifact.execution, sharding, rows, artifact.context_of_text)
    figures = evaluate(artifact.params, heldout)
    lossy = f"not available: the tokenizer loses text ({heldout.lossy})"
    baselines = {} if heldout.lossy else heldout.compressed_bits_per_byte()
    table = [
        ("artifact", f"{name}, step {artifact.step}"),
        ("text", config.data.path or "held-out documents of the run"),
        ("documents", f"{heldout.documents:,}" + (f" ({left_out} left out)" if left_out else "")),
        ("bytes", f"{heldout.bytes:,}"),
        ("tokens", f"{figures['tokens']:,.0f}"),
        ("nll (nats per token)", f"{figures['nll']:.4f}"),
        ("perplexity", f"{figures['perplexity']:.3f}"),
        ("bits per byte", lossy if heldout.lossy else f"{figures['bits_per_byte']:.4f}"),
        *((f"bits per byte, {name}", f"{value:.4f}") for name, value in baselines.items()),
    ]
    width = max(len(name) for name, _ in table)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in table))


def _text(config: EvaluateConfig, artifact):
    """(documents to score, how many things were left out)."""
    from step_jax.data import DataConfig, Heldout
    from step_jax.evaluation.corpus import whole_corpus

    name, folder = artifact.name, artifact.directory / "heldout"
    if config.data.path is not None:
        data = DataConfig(
            path=config.data.path, format=config.data.format, text_field=config.data.text_field
        )
        heldout, skips = whole_corpus(data, artifact.tokenizer)
        return heldout, len(skips)
    if not folder.exists():
        raise DataError(
            f"{name} does not keep what it held out (there is no {folder}), and the texts of today "
            "may be others. Give --data.path to score a text that it was not trained on"
        )
    heldout = Heldout.load(folder, artifact.tokenizer)
    if not heldout.documents:
        raise DataError(
            f"{name} held out nothing (data.heldout_fraction was 0): give --data.path to score a "
            "text that it was not trained on"
        )
    return heldout, 0
