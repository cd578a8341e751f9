"""States of texts by frozen encoders, kept on disk so that each text is encoded once.

Shape suffixes: K texts, S tokens of a text, E width of the states.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Artifact
from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.core.files import seal, sealed, write_whole
from step_jax.core.sharding import Sharding
from step_jax.data.captions import Encoded, hash_of, token_rows
from step_jax.models.context import Context
from step_jax.models.text.decoder import Decoder
from step_jax.models.tokens import Tokens
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.text_inputs import States, Tower

ROWS = 16  # texts of one call of an encoder


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder of texts, whose states are made once.

    name: of the model's text input that reads its states.
    artifact, part: a decoder, or a model with a text tower of its own.
    """

    name: str
    artifact: str
    part: str | None = None


def encoder_hash(artifact: Artifact) -> str:
    """SHA-256, hex, of an encoder's model, parameters and tokenizer."""
    both = parameters_hash(artifact) + artifact.tokenizer.hash
    return hashlib.sha256(both.encode()).hexdigest()


def parameters_hash(artifact: Artifact) -> str:
    """SHA-256, hex, of a model and its parameters."""
    digest = hashlib.sha256(repr(artifact.model).encode())
    for leaf in jax.tree.leaves(artifact.params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)))
    return digest.hexdigest()


def states_function(artifact: Artifact, sharding: Sharding) -> tuple[int, Callable]:
    """(width E, (params, tokens (B, S), lengths (B,)) -> states (B, S, E) float32).

    Of a decoder these are the vectors after its last layer, before the final norm, as Step-Video
    takes them of Step-LLM; of a diffusion transformer those of its own text tower.

    Raises:
      CheckpointError: a model that encodes no text.
    """
    model, execution = artifact.model, artifact.execution
    if isinstance(model, Decoder):
        decoder = model

        def of_decoder(params, tokens_BS, lengths_B):
            tokens = Tokens.in_order(*tokens_BS.shape)
            real_BS = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]
            tokens = replace(tokens, segments_BT=real_BS.astype(jnp.int32))
            ctx = Context(tokens, sharding=sharding, execution=execution)
            return decoder.hidden(params, tokens_BS, ctx)[0].astype(jnp.float32)

        return decoder.width, of_decoder
    towers = []
    if isinstance(model, VideoDiT):
        towers = [(i, t) for i, t in enumerate(model.text) if isinstance(t, Tower)]
    if len(towers) != 1:
        raise CheckpointError(
            f"{artifact.name} is a model of kind {model.kind} with {len(towers)} text towers: an "
            "encoder of texts is a decoder, or a video_dit with one tower"
        )
    ((number, tower),) = towers

    def of_tower(params, tokens_BS, lengths_B):
        tokens = Tokens.in_order(*tokens_BS.shape)
        ctx = Context(tokens, sharding=sharding, execution=execution)
        states = tower.states(params.text[number], tokens_BS, lengths_B, ctx)
        return states.astype(jnp.float32)

    return tower.width, of_tower


def encode(
    artifact: Artifact,
    texts: Sequence[str],
    tokens: int,
    sharding: Sharding,
    report: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """States of texts, at most ``tokens`` of each; behind a text's end they are zero."""
    rows = token_rows(artifact.tokenizer, texts, tokens, report)
    width, function = states_function(artifact, sharding)
    compiled = jax.jit(function, out_shardings=sharding.replicated())
    size = -(-min(ROWS, len(texts)) // sharding.ways("batch")) * sharding.ways("batch")
    states = np.zeros((len(texts), tokens, width), np.float32)
    for low in range(0, len(texts), size):
        values, lengths = rows.values[low : low + size], rows.lengths_K[low : low + size]
        more = size - len(lengths)
        padded = np.pad(values, ((0, more), (0, 0))), np.pad(lengths, (0, more))
        states[low : low + size] = np.asarray(compiled(artifact.params, *padded))[: len(lengths)]
    states *= (np.arange(tokens) < rows.lengths_K[:, None])[..., None]
    return Encoded(states, rows.lengths_K, encoder_hash(artifact))


def of_prompts(
    artifact: Artifact,
    prompts: Sequence[str],
    sharding: Sharding,
    load: Callable[[str, Sharding, str | None], Artifact],
    report: Callable[[str], None] = lambda text: None,
    encoders: Sequence[Encoder] = (),
) -> dict[str, Encoded]:
    """Prompts as each text input of a trained diffusion transformer is given them.

    Args:
      load: (name, sharding, part) -> the artifact of an encoder.
      encoders: where they are; those that the model names by default.

    Raises:
      ConfigError: nothing says where an encoder is.
      CheckpointError: an encoder is not the one that the model was trained with, or one of states
        of another width.
    """
    own = artifact.meta.get("config", {}).get("text", {}).get("encoders", ())
    named = {e["name"]: Encoder(**e) for e in own} | {e.name: e for e in encoders}
    encoded = {}
    for t in artifact.model.text:
        if isinstance(t, Tower):
            encoded[t.name] = token_rows(artifact.tokenizer, prompts, t.tokens, report)
            continue
        if t.name not in named:
            raise ConfigError(
                f"{artifact.name} does not say what makes its states {t.name}: name an artifact in "
                "encoders"
            )
        encoder = load(named[t.name].artifact, sharding, named[t.name].part)
        encoded[t.name] = encode(encoder, prompts, t.tokens, sharding, report)
        check_width(encoder.name, encoded[t.name], t)
        if unlike := another_encoder(artifact, t.name, encoder.name, encoded[t.name]):
            raise CheckpointError(unlike)
    return encoded


def another_encoder(artifact: Artifact, name: str, encoder: str, encoded: Encoded) -> str:
    """What to say if a diffusion transformer learnt the states of another encoder; "" else."""
    learnt = artifact.meta.get("data", {}).get("texts", {}).get("made_by", {}).get(name)
    if learnt in (None, encoded.made_by):
        return ""
    return (
        f"{artifact.name} was trained with another encoder {name} ({learnt[:12]}) than {encoder} "
        f"is now ({encoded.made_by[:12]})"
    )


def check_width(encoder: str, encoded: Encoded, wanted: States) -> None:
    """Raises ConfigError if an encoder's states have another width than a model reads."""
    if (width := encoded.values.shape[-1]) != wanted.width:
        raise ConfigError(
            f"the states of {encoder} have width {width}; the model's input {wanted.name} reads "
            f"{wanted.width}"
        )


def cached(
    folder: Path,
    artifact: Artifact,
    texts: Sequence[str],
    tokens: int,
    sharding: Sharding,
    report: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """As :func:`encode`, read from ``folder`` if it has these texts, else written there.

    Raises:
      DataError: the folder's states are of another encoder.
    """
    made_by, manifest = encoder_hash(artifact), folder / "manifest.json"
    wanted = {"encoder": made_by, "tokens": tokens, "texts": hash_of(texts)}
    if saved := _manifest(manifest, report):
        if saved["encoder"] != made_by:
            raise DataError(
                f"the text states in {folder} are of another encoder ({saved['encoder'][:12]}) "
                f"than {artifact.name} ({made_by[:12]}): name another folder, or delete this one"
            )
        if wanted.items() <= saved.items():
            if arrays := _read(folder, saved["files"]):
                values, lengths_K = arrays
                return Encoded(values, lengths_K, made_by)
            report(f"the text states in {folder} are damaged: they are made again")
        else:
            report(f"the text states in {folder} are of other texts: they are made again")
    encoded = encode(artifact, texts, tokens, sharding, report)
    if jax.process_index() == 0:
        files = {}
        for name, array in (("states.npy", encoded.values), ("lengths.npy", encoded.lengths_K)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            write_whole(folder / name, buffer.getvalue())
            files[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
        seal(manifest, wanted | {"files": files})
    return encoded


def _manifest(path: Path, report: Callable[[str], None]) -> dict[str, Any] | None:
    """What is known of the states of a folder; None if there are none, or nobody knows of what."""
    try:
        return sealed(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        report(f"{error}: the text states are made again")
        return None


def _read(folder: Path, files: dict[str, str]) -> list[np.ndarray] | None:
    """Values and lengths; None if they are not what was written."""
    arrays = []
    for name in ("states.npy", "lengths.npy"):
        path = folder / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != files[name]:
            return None
        arrays.append(np.load(path, mmap_mode="r"))
    return arrays
