"""Exports small models, loads them with `transformers` and compares logits and generated text.

Two halves, since the two libraries need not share an environment (a minute of one core; no network,
no accelerator):

    python tests/golden/check_hf_export.py write FOLDER      # with step_jax
    python tests/golden/check_hf_export.py check FOLDER      # with torch and transformers 4.57 or 5

`write` imports every golden model, exports it to FOLDER/NAME with a stop token that greedy text
reaches, and keeps its logits and its greedy text beside it. `check` loads each folder by the class
that the report names: logits must agree to 1e-4 of their largest, and `generate` must give the same
tokens and stop where ours stops. Last run: 4.57.6 and 5.24.0, all models (Step-3.5 by 5.24 alone).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROWS, NEW = 2, 12


def write(folder: Path) -> None:
    import jax

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from step_jax.interop import hf
    from step_jax.models.context import Context, Execution
    from step_jax.models.tokens import Tokens
    from tests.golden import golden

    def logits(config, params, tokens_BT):
        ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=Execution(dtype="float32"))
        x_BTD, *_ = config.hidden(params, tokens_BT, ctx)
        return config.logits(params, x_BTD, ctx)

    def greedy(config, params, tokens_BT):
        """NEW more tokens of every row: a row of fixed length, filled from the left."""
        step = jax.jit(lambda p, t: logits(config, p, t))
        start = tokens_BT.shape[1]
        tokens_BT = np.pad(tokens_BT, ((0, 0), (0, NEW)))
        for t in range(start, start + NEW):
            tokens_BT[:, t] = np.argmax(np.asarray(step(params, tokens_BT))[:, t - 1], -1)
        return tokens_BT[:, start:]

    for name in golden.NAMES:
        g = golden.load(name)
        config = hf.config_from_hf(g.config)
        params = hf.params_from_hf(
            g.state,
            config,
            rope_interleave=g.config.get("rope_interleave", True),
            ignored=hf.left_out(g.config),
        )
        text = greedy(config, params, g.tokens_BT[:, :8])
        stop = int(text[0, NEW // 2])
        report = hf.save_hf(
            folder / name,
            params,
            config,
            dtype="float32",
            context_length=64,
            bos_id=0,
            eos_ids=(stop,),
            max_shard_size=60_000,
        )
        np.savez(
            folder / f"{name}.npz",
            tokens=g.tokens_BT,
            logits=np.asarray(jax.jit(lambda p, t, c=config: logits(c, p, t))(params, g.tokens_BT)),
            greedy=text,
            auto_class=str(report.auto_class),
        )
        print(f"{name}: {report.architecture}, {len(report.files)} files, stops at {stop}")


def check(folder: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    print("transformers", transformers.__version__)
    for file in sorted(folder.glob("*.npz")):
        kept = np.load(file)
        model = load_model(folder / file.stem, str(kept["auto_class"]))
        if model is None:
            print(f"{file.stem}: no class in this version")
            continue
        model = model.float().eval()
        tokens = torch.from_numpy(kept["tokens"]).long()
        with torch.no_grad():
            theirs = model(input_ids=tokens, use_cache=False).logits.numpy()
        error = np.abs(theirs - kept["logits"]).max() / np.abs(theirs).max()
        assert error < 1e-4, (file.stem, error)
        stop = model.generation_config.eos_token_id
        for row in range(ROWS):
            got = model.generate(
                tokens[row : row + 1, :8], max_new_tokens=NEW, attention_mask=torch.ones(1, 8)
            )[0, 8:].numpy()
            ours = kept["greedy"][row]
            ends = np.flatnonzero(ours == stop)
            expected = ours[: ends[0] + 1] if len(ends) else ours
            np.testing.assert_array_equal(got, expected, err_msg=file.stem)
        print(f"{file.stem}: {type(model).__name__}, logits to {error:.1e}, text equal")


def load_model(path: Path, auto_class: str):
    """The model of a folder by the class of that name, "None" for a Step-3.5-Flash; None if this
    version has no class for it. No tensor may be missing or left over."""
    import transformers

    sees = "None", "AutoModelForImageTextToText"
    if auto_class in sees and not hasattr(transformers, "Step3p7ForConditionalGeneration"):
        return None
    if auto_class != "None":
        loaded, info = getattr(transformers, auto_class).from_pretrained(
            path, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            info
        )
        return loaded
    # The decoder as a part of the model that also sees, whose tower is random and not called.
    wrapped = path.with_name(path.name + "_wrapped")
    wrapped.mkdir(exist_ok=True)
    for file in path.iterdir():
        (wrapped / file.name).write_bytes(file.read_bytes())
    tower = {
        "width": 4,
        "layers": 1,
        "heads": 1,
        "image_size": 16,
        "patch_size": 4,
        "mlp_ratio": 1.0,
    }
    text = json.loads((path / "config.json").read_text())
    config = {"model_type": "step3p7", "text_config": text, "vision_config": tower}
    (wrapped / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForImageTextToText.from_pretrained(
        wrapped, attn_implementation="eager"
    )


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
