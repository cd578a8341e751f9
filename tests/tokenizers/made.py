"""Small tokenizers, trained or put together by the package that they are compared with."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from step_jax.tokenizers.huggingface import HuggingFaceTokenizer
from tests.data.conftest import text_of

TEXTS = [text_of(seed, 20) for seed in range(20)]


def byte_level(normalizer=None) -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _trained(
        made,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2 has it: a mark before the first word, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz.",
        "qu",
        "th",
        "the",
        "\u2581the",
        "fo",
        "fox",
    ]
    pieces += ["\u2581fo", "\u2581fox", "\u2581\u2581"]
    merges = [("q", "u"), ("t", "h"), ("th", "e"), ("\u2581", "the"), ("f", "o"), ("fo", "x")]
    merges += [("\u2581", "fo"), ("\u2581", "fox"), ("\u2581", "\u2581")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram() -> tokenizers.Tokenizer:
    """As T5 has it: unknown characters are lost."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return _trained(made, trainer)


def _trained(made, trainer) -> tokenizers.Tokenizer:
    made.train_from_iterator(TEXTS, trainer)
    return made


def ours(made: tokenizers.Tokenizer, **configuration) -> HuggingFaceTokenizer:
    """The same tokenizer through step_jax, with JSON files beside it by name."""
    files = {"tokenizer.json": made.to_str().encode()}
    files |= {f"{name}.json": json.dumps(v).encode() for name, v in configuration.items()}
    return HuggingFaceTokenizer(files, "made")
