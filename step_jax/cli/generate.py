"""``step-jax generate ARTIFACT [--prompt TEXT ...] [--temperature T] ...``: a model writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from step_jax.cli.arguments import artifact_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.inference.sampling import SamplingConfig
from step_jax.tokenizers.base import Tokenizer

_DESCRIPTION = """Write text with a language model: step-jax generate ARTIFACT [--prompt TEXT] ...
ARTIFACT is RUN, RUN@STEP or hf:PATH."""


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """What to write.

    prompt: the texts to go on from; an empty one starts a new document.
    prompts_file: one prompt a line instead.
    chat: the prompts are what a user says, and the answers are written: with the chat template that
      comes with the tokenizer.
    system: what stands before them, with chat.
    batch_size: texts that are written at a time.
    part: which of the artifact's models; its first by default.
    """

    prompt: tuple[str, ...] = ("",)
    prompts_file: Path | None = None
    chat: bool = False
    system: str = ""
    batch_size: int = 16
    part: str | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if any(self.prompt) and self.prompts_file:
            raise ConfigError("prompt and prompts_file are both given: keep one of them")
        if self.batch_size < 1 or not self.prompt:
            raise ConfigError(f"give a prompt, and a batch_size of at least 1: {self}")
        if self.chat and not self.prompts_file and not all(self.prompt):
            raise ConfigError("chat needs what the user says: give --prompt or --prompts-file")
        if self.system and not self.chat:
            raise ConfigError("system is part of a conversation: it needs --chat")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})

    def encode(self, tokenizer: Tokenizer, prompt: str) -> tuple[str, list[int]]:
        """(the text that is shown before the one that is written, token ids that it follows)."""
        if not self.chat:
            return prompt, tokenizer.encode_prompt(prompt)
        from step_jax.tokenizers.chat import encode_request

        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": prompt})
        return "", encode_request(tokenizer, messages, f"the prompt {prompt[:40]!r}")

    def prompts(self) -> tuple[str, ...]:
        """The prompts. Raises ConfigError if the file cannot be read or holds none."""
        if self.prompts_file is None:
            return self.prompt
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
        prompts = tuple(line for line in lines if line.strip())
        if not prompts:
            raise ConfigError(f"prompts file {self.prompts_file} has no line of text")
        return prompts


def parse(argv: list[str]) -> tuple[str, GenerateConfig]:
    """(the artifact's name, what to do with it)."""
    name, options = artifact_and_options(argv, "step-jax generate")
    loaded = load_config(
        GenerateConfig, options, prog="step-jax generate ARTIFACT", description=_DESCRIPTION
    )
    return name, loaded.config


def run(asked: tuple[str, GenerateConfig]) -> None:
    name, config = asked
    prompts = config.prompts()

    from step_jax.interop.artifacts import load_artifact
    from step_jax.models.text.decoder import Decoder

    sharding = Sharding.build(config.parallel).for_inference()
    artifact = load_artifact(name, sharding, config.part)
    artifact.require(Decoder, "step-jax generate")
    print(f"{name}, step {artifact.step}", file=sys.stderr)
    _write(artifact, sharding, config, prompts)


def _write(artifact, sharding, config: GenerateConfig, prompts) -> None:
    """Prints the continuations in order; the only one while it is being written."""
    from step_jax.inference.generate import generate
    from step_jax.tokenizers.base import TextStream

    tokenizer, alone = artifact.tokenizer, len(prompts) == 1
    shown, ids = zip(*(config.encode(tokenizer, prompt) for prompt in prompts), strict=True)
    screen = _Screen(shown[0], TextStream(tokenizer.decode, ids[0]))
    ended: dict[int, list[int]] = {}
    printed = 0

    def show(row: int, completion) -> None:
        nonlocal printed
        if completion.reason == "context":
            print(
                f"text {row} ended at the model's context of {artifact.context} tokens",
                file=sys.stderr,
            )
        ended[row] = completion.tokens
        while not alone and printed in ended:
            text = tokenizer.decode_continuation(ids[printed], ended.pop(printed))
            print(f"--- {printed}\n{shown[printed]}{text}", flush=True)
            printed += 1

    generate(
        artifact.params,
        artifact.model,
        ids,
        config.sampling,
        max_length=artifact.context_of_text,
        stop_ids=tokenizer.stop_ids,
        execution=artifact.execution,
        sharding=sharding,
        on_tokens=(lambda row, tokens: screen.show(tokens)) if alone else None,
        on_end=show,
        slots=config.batch_size,
        chunk=8 if alone else 32,
    )
    if alone:
        screen.end()


class _Screen:
    """Prints a text as its tokens come; the prompt not before the first of them."""

    def __init__(self, prompt: str, stream):
        self.unseen, self.stream = prompt, stream

    def show(self, tokens: list[int]) -> None:
        print(self.unseen + self.stream.push(tokens), end="", flush=True)
        self.unseen = ""

    def end(self) -> None:
        print(self.unseen + self.stream.end(), flush=True)
