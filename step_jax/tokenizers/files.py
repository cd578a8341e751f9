"""Finding and reading the files of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_jax.core.errors import DataError
from step_jax.core.storage import local
from step_jax.tokenizers.base import FILES, Tokenizer
from step_jax.tokenizers.special_tokens import generation_of, parse_object

_REMEDY = "Give a SentencePiece .model file, a tokenizer.json, or a folder with either"
_REMEDY_TEMPLATE = "Give chatml, plain, or a file with a Jinja template (data.chat_template)"
_CONVERT = (
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one"
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or folder.

    Args:
      path: a SentencePiece ``.model``, a ``tokenizer.json`` (these two alone, without the files
        beside them), or a folder with either: as `Tokenizer.save` and Hugging Face write them, with
        ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json`` (in its
        place the model's ``config.json``) and ``chat_template.jinja``. A folder with both is read
        from its ``tokenizer.json``.

    Raises:
      DataError: there is none, or a file of it is damaged; says what was found and what is missing.
    """
    path = local(path, "the tokenizer")
    if not path.is_dir():
        if path.suffix not in (".model", ".json"):
            state = "is no tokenizer" if path.exists() else "does not exist"
            raise DataError(f"tokenizer {path} {state}. {_REMEDY}, or `data.tokenizer: train`")
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        return _make({name: read_file(path)}, str(path))
    files = {name: read_file(path / name) for name in FILES if (path / name).exists()}
    if "generation_config.json" not in files and (path / "config.json").exists():
        files |= generation_of(read_file(path / "config.json"), f"{path}, config.json")
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise DataError(_nothing_in(path, [model.name for model in models]))
        files["tokenizer.model"] = read_file(models[0])
    return _make(files, str(path))


def _make(files: dict[str, bytes], name: str) -> Tokenizer:
    if "tokenizer.json" in files:
        from step_jax.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files, name)
    from step_jax.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(files, name)


def chat_tokenizer(tokenizer: Tokenizer, which: str) -> Tokenizer:
    """The same tokenizer with a chat template, whose answers end with one of its stop tokens.

    Args:
      which: ``auto`` (its own, ``plain`` if it has none), ``chatml``, ``plain``, or the path of a
        Jinja file.

    Raises:
      DataError: there is no such template, or it does not work with this tokenizer.
    """
    from step_jax.tokenizers.chat import BUILT_IN, built_in, end_of_answer, variables_of
    from step_jax.tokenizers.template import ChatTemplate

    own, files = tokenizer.chat_template, dict(tokenizer.files)
    if which == "auto" and own is not None:
        template = own
    elif which in ("auto", *BUILT_IN):
        template = built_in("plain" if which == "auto" else which, tokenizer)
    else:
        source = read_file(Path(which).expanduser(), _REMEDY_TEMPLATE)
        variables = variables_of(tokenizer) | (own.variables if own else {})
        template = ChatTemplate(source.decode(errors="replace"), variables, which)
    if template is not own:
        files["chat_template.jinja"] = template.source.encode()
        config = _object_in(files, "tokenizer_config.json", tokenizer.name)
        if lacking := {k: v for k, v in template.variables.items() if config.get(k) is None}:
            files["tokenizer_config.json"] = json.dumps(config | lacking, indent=1).encode()
    end = end_of_answer(tokenizer, template)
    if end is not None and end not in tokenizer.stop_ids:
        generation = _object_in(files, "generation_config.json", tokenizer.name)
        generation["eos_token_id"] = [*tokenizer.stop_ids, end]
        files["generation_config.json"] = json.dumps(generation, indent=1).encode()
    return tokenizer if files == tokenizer.files else _make(files, tokenizer.name)


def _object_in(files: Mapping[str, bytes], name: str, owner: str) -> dict[str, Any]:
    return parse_object(files[name], f"{owner}, {name}") if name in files else {}


def read_file(path: Path, remedy: str = f"{_REMEDY}, or `data.tokenizer: train`") -> bytes:
    """A file of a tokenizer; raises `DataError` if it is unreadable, empty, or not the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    if not content.strip():
        raise DataError(f"{path} is empty: copy or download it again")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path} is the pointer that Git LFS leaves in place of a large file: fetch the file "
            "itself with `git lfs pull`"
        )
    return content


def _nothing_in(folder: Path, models: list[str]) -> str:
    if models:
        return f"{folder} has several SentencePiece models ({', '.join(models)}): name one"
    found = sorted(p.name for p in folder.iterdir())[:12]
    listed = ", ".join(found) or "nothing"
    source = next(
        (n for n in found if n in ("vocab.json", "tekken.json") or n.endswith(".tiktoken")), None
    )
    if source:
        return f"{folder} has {source}, but no tokenizer.json, which is read here: {_CONVERT}"
    return f"{folder} has neither tokenizer.json nor a .model file (found: {listed}). {_REMEDY}"
