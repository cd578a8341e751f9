"""Checkpoints of other people through our commands and back, compared with `transformers`.

For every family a small random checkpoint in the words of its released files (config.json,
tokenizer.json, special tokens, generation_config.json) goes through

    step-jax generate hf:PATH          step-jax pretrain --init-from.artifact hf:PATH
    step-jax generate RUN              step-jax export RUN FOLDER

and at both ends logits, tokens of texts, greedy text and where it stops are those of `transformers`
(three minutes of one core; no network, no accelerator). One command prints the table of
docs/interop.md; each ORACLE is a Python with torch and transformers, the first of version 5:

    python tests/golden/check_hf_commands.py FOLDER ORACLE [ORACLE ...]

`make` (first oracle) writes FOLDER/NAME/theirs, `commands` (this Python) FOLDER/NAME/run, exported
and ours.npz, `check` (every oracle) loads both ends and says how far they are from ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
NEW, CONTEXT, VOCAB = 14, 32, 384  # the vocabulary has more rows than the tokenizer tokens
PROMPT = "the quick fox"
TEXTS = ["hello world", "  two  spaces\n\n and lines ", "caf\u00e9 \u4e16\u754c \U0001f600 123"]
COLUMNS = ("logits in", "text in", "logits out", "text out", "tokens", "stops after")

# --- the checkpoints -----------------------------------------------------------------------------

SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "use_cache": True,
}
LLAMA = {
    **SHARED,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 4.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}
QWEN2 = {
    **SHARED,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
    "max_window_layers": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN3 = {
    **QWEN2,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "attention_bias": False,
    "rope_scaling": None,
}
DEEPSEEK = {
    **SHARED,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "tie_word_embeddings": False,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [16, 16],
}

BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
LLAMA_TOKENS = {
    "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "put": "<|begin_of_text|>",
    "config": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    },
    "stops": ["<|end_of_text|>", "<|eot_id|>"],
}
QWEN_TOKENS = {
    "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "put": None,
    "config": {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "begin": "<|endoftext|>",  # of generation_config.json alone
    "stops": ["<|im_end|>", "<|endoftext|>"],
}
DEEPSEEK_TOKENS = {
    "special": [BEGIN, END, "<\uff5cUser\uff5c>"],
    "put": BEGIN,
    "config": {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": BEGIN, "lstrip": False,
                      "normalized": True, "rstrip": False, "single_word": False},
        "eos_token": {"__type": "AddedToken", "content": END, "lstrip": False,
                      "normalized": True, "rstrip": False, "single_word": False},
        "pad_token": END,
    },
    "stops": [END],
}  # fmt: skip
STEP_TOKENS = {**DEEPSEEK_TOKENS, "stops": [END, "<\uff5cUser\uff5c>"]}


def families() -> dict[str, tuple[dict, dict]]:
    """name -> (config.json, tokenizer). Needs the oracle's libraries."""
    from make_hf_golden import MODELS

    sees = MODELS["step3p7"][1]
    text = {**sees["text_config"], "vocab_size": VOCAB, "torch_dtype": "float32"}
    return {
        "Llama": (LLAMA, LLAMA_TOKENS),
        "Qwen2.5": (QWEN2, QWEN_TOKENS),
        "Qwen3": (QWEN3, {**QWEN_TOKENS, "in_config": True}),
        "DeepSeek-V3, YaRN": (DEEPSEEK, DEEPSEEK_TOKENS),
        "DeepSeek-V3, YaRN, fp8": ({**DEEPSEEK, "quantization_config": FP8}, DEEPSEEK_TOKENS),
        "Step-3.5-Flash": ({**text, "model_type": "step3p5"}, STEP_TOKENS),
        "Step-3.7-Flash": ({**sees, "model_type": "step3p7", "text_config": text}, STEP_TOKENS),
    }


def make(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i, file in enumerate(sorted((ROOT / "docs").glob("*.md"))[:8]):
        (texts / f"{i}.txt").write_text(file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    for seed, (name, (config, tokens)) in enumerate(families().items()):
        theirs = folder / name / "theirs"
        theirs.mkdir(parents=True)
        ids = write_tokenizer(theirs, tokens, texts)
        write_weights(theirs, config, seed)
        reference = theirs.with_name("reference") if "quantization_config" in config else theirs
        stop = find_stop(reference, max(ids.values()))
        named = {
            "bos_token_id": ids[tokens["put"] or tokens["begin"]],
            "eos_token_id": [*(ids[token] for token in tokens["stops"]), stop],
        }
        if not tokens.get("in_config"):
            generation = json.dumps({**named, "do_sample": True, "temperature": 0.6})
            (theirs / "generation_config.json").write_text(generation)
        for end in {theirs, reference}:
            kept = json.loads((end / "config.json").read_text())
            (end / "config.json").write_text(json.dumps({**kept, **named}, indent=1))


def write_tokenizer(folder: Path, tokens: dict, texts: Path) -> dict[str, int]:
    """A byte-level tokenizer with the family's special tokens; gives the ids of all tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre

    words = (  # of Qwen2 and its relatives, which their class of tokenizers has whatever the file
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex(words), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train([str(file) for file in sorted(texts.iterdir())], trainer)
    made.add_special_tokens(tokens["special"])
    after: list = [processors.ByteLevel(trim_offsets=False)]
    if tokens["put"]:
        named = [(tokens["put"], made.token_to_id(tokens["put"]))]
        put = processors.TemplateProcessing(
            f"{tokens['put']} $A", f"{tokens['put']} $A {tokens['put']}:1 $B:1", named
        )
        after.append(put)
    made.post_processor = processors.Sequence(after)
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    config = {**tokens["config"], "chat_template": template, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made.get_vocab()


def write_weights(folder: Path, config: dict, seed: int) -> None:
    """config.json and model.safetensors; what a quantized model is without it in reference/."""
    import tempfile

    import transformers
    from make_hf_golden import randomise
    from safetensors.torch import load_file, save_file

    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    alone = config["model_type"] == "step3p5"
    sees = {**families()["Step-3.7-Flash"][0], "text_config": plain} if alone else plain
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in sees:
        auto = transformers.AutoModelForImageTextToText
    sees = json.loads(json.dumps(sees))  # the library writes into what it is given
    model = auto.from_config(transformers.AutoConfig.for_model(**sees)).float().eval()
    randomise(model, np.random.default_rng(seed), zero_centred="vision_config" in sees)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        state = load_file(Path(saved) / "model.safetensors")
    if alone:
        state = {k: v for k, v in state.items() if not re.match(r"(model\.)?(vision|vit_)", k)}
    if "quantization_config" in config:
        reference = folder.with_name("reference")
        reference.mkdir()
        for file in folder.iterdir():
            (reference / file.name).write_bytes(file.read_bytes())
        state, there = quantized(state)
        save_file(there, reference / "model.safetensors", {"format": "pt"})
        (reference / "config.json").write_text(json.dumps(plain))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def quantized(state: dict) -> tuple[dict, dict]:
    """(weights of eight bits with a scale per block, what they stand for)."""
    import torch

    size, stored, meant = FP8["weight_block_size"][0], {}, dict(state)
    for name, w in state.items():
        stored[name] = w
        if not name.endswith("proj.weight") and "kv_a_proj" not in name:
            continue
        rows, columns = (-(-n // size) for n in w.shape)
        padded = torch.zeros(rows * size, columns * size)
        padded[: w.shape[0], : w.shape[1]] = w
        blocks = padded.reshape(rows, size, columns, size)
        scale = blocks.abs().amax((1, 3)) / 448
        eight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        back = eight.float() * scale[:, None, :, None]
        cut = (slice(w.shape[0]), slice(w.shape[1]))
        stored[name] = eight.reshape(padded.shape)[cut].contiguous()
        stored[f"{name}_scale_inv"] = scale
        meant[name] = back.reshape(padded.shape)[cut].contiguous()
    return stored, meant


def auto_class(folder: Path) -> str:
    """The class that loads a folder, "None" for a decoder that is only part of one."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    special = {"step3p5": "None", "step3p7": "AutoModelForImageTextToText"}
    return special.get(kind, "AutoModelForCausalLM")


def find_stop(folder: Path, most: int) -> int:
    """A token that greedy text reaches after a few others, for generation to stop at."""
    import torch
    from check_hf_export import load_model
    from transformers import AutoTokenizer

    model = load_model(folder, auto_class(folder)).float().eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + NEW:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    written = ids[start:]
    return next(
        token
        for place, token in enumerate(written)
        if place >= 3 and written.index(token) == place and token <= most
    )


# --- ours ----------------------------------------------------------------------------------------


def commands(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from step_jax.core.sharding import MeshConfig, Sharding
    from step_jax.interop.artifacts import load_artifact

    sharding = Sharding.build(MeshConfig(fsdp=-1))
    for path in sorted(p.parent for p in folder.glob("*/theirs")):
        theirs, run, out = f"hf:{path / 'theirs'}", str(path / "run"), str(path / "exported")
        greedy = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(NEW)]
        text_in = command("generate", theirs, *greedy)
        start = ["--init-from.artifact", theirs, "--run.directory", run]
        data = ["--data.path", str(folder / "texts"), "--data.sequence_length", str(CONTEXT)]
        steps = ["--training.steps", "3", "--training.batch_size", "2"]
        rate = ["--optimizer.learning_rate", "1e-4", "--optimizer.schedule.warmup_steps", "1"]
        rest = ["--sample.tokens", "0", "--execution.dtype", "float32"]
        command("pretrain", *start, *data, *steps, *rate, *rest)
        text_out = command("generate", run, *greedy)
        command("export", run, out, "--dtype", "float32")
        ends = {"in": load_artifact(theirs, sharding), "out": load_artifact(run, sharding)}
        tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, CONTEXT), dtype=np.int32)
        kept = {"tokens": tokens_BT, "text_in": text_in, "text_out": text_out}
        kept |= {f"logits_{end}": logits(ends[end], tokens_BT) for end in ends}
        moved = np.abs(kept["logits_out"] - kept["logits_in"]).max()
        assert moved > 1e-3 * np.abs(kept["logits_in"]).max(), "nothing was trained"
        for end, artifact in ends.items():
            special = "".join(artifact.tokenizer.special)
            texts = [*TEXTS, special + TEXTS[0] + special]
            kept |= {
                f"ids_{end}_{i}": artifact.tokenizer.encode(x, True) for i, x in enumerate(texts)
            }
            kept |= {
                f"prompt_{end}_{i}": artifact.tokenizer.encode_prompt(x)
                for i, x in enumerate(TEXTS)
            }
            kept[f"special_{end}"] = special
        np.savez(path / "ours.npz", **kept)


def command(*words: str) -> str:
    """What ``step-jax WORDS`` prints."""
    from step_jax.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(list(words))
    assert code == 0, (code, words)
    return printed.getvalue().removesuffix("\n")


def logits(artifact, tokens_BT) -> np.ndarray:
    import jax

    from step_jax.models.context import Context, Execution
    from step_jax.models.tokens import Tokens

    def forward(params):
        ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=Execution(dtype="float32"))
        x_BTD, *_ = artifact.model.hidden(params, tokens_BT, ctx)
        return artifact.model.logits(params, x_BTD, ctx)

    return np.asarray(jax.jit(forward)(artifact.params))


# --- both ----------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """Prints a JSON line for each checkpoint; an AssertionError says what is not equal."""
    import torch
    import transformers
    from check_hf_export import load_model

    torch.set_num_threads(1)
    for path in sorted(p.parent for p in folder.glob("*/theirs")):
        kept = np.load(path / "ours.npz")
        row: dict[str, str] = {"name": path.name, "version": transformers.__version__}
        counts, places = 0, []
        for end in ("in", "out"):
            source = path / {"in": "theirs", "out": "exported"}[end]
            read = path / "reference" if end == "in" and (path / "reference").exists() else source
            counts += same_tokens(source, kept, end)
            model = load_model(read, auto_class(read))
            if model is None:
                row |= {f"logits {end}": "no class", f"text {end}": "no class"}
                continue
            model = model.float().eval()
            with torch.no_grad():
                theirs = model(input_ids=torch.from_numpy(kept["tokens"]).long()).logits.numpy()
            error = np.abs(theirs - kept[f"logits_{end}"]).max() / np.abs(theirs).max()
            assert error < 1e-4, (path.name, end, error)
            row[f"logits {end}"] = f"{error:.1e}"
            if read != source:  # what says where to stop is beside the quantized weights
                kept_config = transformers.GenerationConfig.from_pretrained(source)
                model.generation_config = kept_config
            places.append(same_text(model, source, str(kept[f"text_{end}"])))
            row[f"text {end}"] = "equal"
        row["tokens"] = f"{counts} texts equal"
        row["stops after"] = ", ".join(places) or "no class"
        print(json.dumps(row), flush=True)


def same_tokens(folder: Path, kept, end: str) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = str(kept[f"special_{end}"])
    texts = [*TEXTS, special + TEXTS[0] + special]
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert kept[f"ids_{end}_{i}"].tolist() == ids, (folder, text, ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[i % len(TEXTS)], text
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text).input_ids
        assert kept[f"prompt_{end}_{i}"].tolist() == ids, (folder, text, ids)
    return len(texts)


def same_text(model, folder: Path, ours: str) -> str:
    """Where greedy text stops: tokens that were written, of those that were allowed."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    written = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids)
    )[0, ids.shape[1] :].tolist()
    theirs = PROMPT + tokenizer.decode(written, skip_special_tokens=True)
    # a terminal is shown each run of broken bytes as it comes, a decoder sees them at once
    ours, theirs = (re.sub("\ufffd+", "\ufffd", text) for text in (ours, theirs))
    assert ours == theirs, (folder, ours, theirs)
    return f"{len(written)} of {NEW}"


# --- the one command -----------------------------------------------------------------------------


def main(folder: Path, oracles: list[str]) -> None:
    def half(python: str, name: str) -> str:
        words = [python, __file__, name, str(folder)]
        return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout

    half(oracles[0], "make")
    half(sys.executable, "commands")
    rows = [json.loads(line) for o in oracles for line in half(o, "check").splitlines()]
    table = [("checkpoint", "transformers", *COLUMNS)]
    table += [(r["name"], r["version"], *(r[c] for c in COLUMNS)) for r in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in table]
    lines.insert(1, " | ".join("-" * w for w in widths))
    print("\n".join(f"| {line} |" for line in lines))


if __name__ == "__main__":
    halves = {"make": make, "commands": commands, "check": check}
    if sys.argv[1] in halves:
        halves[sys.argv[1]](Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
