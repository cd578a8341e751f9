"""``step-jax generate RUN [--prompt TEXT] [--temperature T] ...``: a trained model writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from step_jax.cli.arguments import run_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.inference.sampling import SamplingConfig

_DESCRIPTION = """Write text with the model of a run: step-jax generate RUN [--prompt TEXT] ...
RUN is a run directory or one of its checkpoints/STEP."""


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """What to write.

    prompt: the text to go on from; empty starts a new document.
    prompts_file: one prompt a line instead; they are written in batches.
    batch_size: rows of a batch of ``prompts_file``.
    step: the checkpoint to use; the newest verified one by default.
    """

    prompt: str = ""
    prompts_file: Path | None = None
    batch_size: int = 16
    step: int | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if self.prompt and self.prompts_file:
            raise ConfigError("prompt and prompts_file are both given: keep one of them")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})

    def prompts(self) -> list[str]:
        """The prompts. Raises ConfigError if the file cannot be read or holds none."""
        if self.prompts_file is None:
            return [self.prompt]
        try:
            data = self.prompts_file.read_bytes()
            lines = data.decode().splitlines()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ConfigError(
                f"prompts file {self.prompts_file}, line {line}: byte 0x{data[error.start]:02x} is "
                "not UTF-8 text; save the file as UTF-8"
            ) from error
        except OSError as error:
            raise ConfigError(f"prompts file {self.prompts_file}: {error}") from error
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"prompts file {self.prompts_file} has no line of text")
        return prompts


def main(argv: list[str]) -> None:
    run, options = run_and_options(argv, "step-jax generate")
    loaded = load_config(
        GenerateConfig, options, prog="step-jax generate RUN", description=_DESCRIPTION
    )
    config, prompts = loaded.config, loaded.config.prompts()

    from step_jax.checkpoint.load import load_model

    sharding = Sharding.build(config.parallel)
    trained = load_model(run, sharding, config.step)
    print(f"{run}, step {trained.step}", file=sys.stderr)
    for start in range(0, len(prompts), config.batch_size):
        _write(trained, sharding, config.sampling, prompts[start:][: config.batch_size], start)


def _write(trained, sharding: Sharding, sampling: SamplingConfig, prompts: list[str], first: int):
    """Prints the continuations of a batch; a single one while it is being written."""
    from step_jax.inference.generate import generate

    tokenizer, alone = trained.tokenizer, len(prompts) == 1
    screen = _Screen(tokenizer, prompts[0])
    generation = generate(
        trained.params,
        trained.decoder,
        [tokenizer.encode(prompt).tolist() for prompt in prompts],
        sampling,
        max_length=trained.data.sequence_length,
        stop_ids=(tokenizer.eos_id,),
        start_id=tokenizer.bos_id,
        execution=trained.execution,
        sharding=sharding,
        requests=range(first, first + len(prompts)),
        on_tokens=(lambda row, tokens: screen.show(tokens)) if alone else None,
        chunk=8,
    )
    if alone:
        screen.end()
    for row, prompt in enumerate(prompts if not alone else []):
        print(f"--- {first + row}\n{prompt}{tokenizer.decode(generation.tokens[row])}", flush=True)
    for row, reason in enumerate(generation.reasons):
        if reason == "context":
            print(
                f"text {first + row} ended at the model's context of "
                f"{trained.data.sequence_length} tokens",
                file=sys.stderr,
            )


class _Screen:
    """Prints a text as its tokens come, each character once it is whole."""

    def __init__(self, tokenizer, prompt: str):
        self.tokenizer, self.prompt, self.shown = tokenizer, prompt, 0
        self.tokens: list[int] = []

    def show(self, tokens: list[int]) -> None:
        self.tokens += tokens
        text = self._text().rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))

    def end(self) -> None:
        print(self._text()[self.shown :], flush=True)

    def _text(self) -> str:
        return self.prompt + self.tokenizer.decode(self.tokens)
