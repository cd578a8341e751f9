"""MaxText's own training loop, held at the start of a step until step_time.py asks for more."""

from __future__ import annotations

import os
import tempfile

import protocol

shape = protocol.arguments()
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.metadata  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402

SYNTHETIC_RUN = (
    "hardware=cpu",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
    "enable_goodput_recording=false",
    "enable_tensorboard=false",
    "log_config=false",
    "attention=dot_product",
)


def overrides(output: str) -> list[str]:
    values = {
        "run_name": "step_time",
        "base_output_directory": output,
        "steps": 1_000_000,
        "base_emb_dim": shape["width"],
        "base_num_query_heads": shape["heads"],
        "base_num_kv_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "base_mlp_dim": shape["hidden"],
        "base_num_decoder_layers": shape["layers"],
        "vocab_size": shape["vocab"],
        "max_target_length": shape["seq"],
        "per_device_batch_size": shape["batch"],
        "dtype": shape["dtype"],
        "remat_policy": shape["maxtext_remat"],
    }
    if shape["experts"]:  # no capacity: nothing is dropped with either product
        values |= {
            "decoder_block": "mixtral",
            "num_experts": shape["experts"],
            "num_experts_per_tok": shape["top_k"],
            "base_moe_mlp_dim": shape["hidden"],
            "megablox": "false",
            "sparse_matmul": shape["maxtext_experts"] == "ragged",
        }
    return [*SYNTHETIC_RUN, *(f"{key}={value}" for key, value in values.items())]


def main(argv) -> None:
    iteration = train.training_loop_iteration
    asked, left, started = None, 1, False

    def held(device_state, *rest):
        nonlocal asked, left, started
        while left == 0:
            jax.block_until_ready(device_state["state"])
            if not started:
                started = True
                leaves = jax.tree.leaves(device_state["state"].model)
                weights = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
                parameters = sum(x.size for x in weights)  # without counters and keys
                asked = protocol.requests(
                    parameters, f"maxtext {importlib.metadata.version('maxtext')}"
                )
            left = next(asked, None)
            if left is None:
                raise SystemExit(0)
        left -= 1
        return iteration(device_state, *rest)

    train.training_loop_iteration = held
    with tempfile.TemporaryDirectory() as output:
        train.main(["", *overrides(output)])


app.run(main, argv=[""])
