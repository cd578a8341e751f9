"""A plain PyTorch loop over transformers' Llama, eager or compiled, for step_time.py."""

from __future__ import annotations

import protocol

shape = protocol.arguments()

import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["seq"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if shape["torch_compile"] else model
    rows = torch.randint(0, shape["vocab"], (shape["batch"], shape["seq"]))
    bfloat16 = shape["dtype"] == "bfloat16"

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    step()
    parameters = sum(p.numel() for p in model.parameters())
    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for steps in protocol.requests(parameters, version):
        for _ in range(steps):
            step()


main()
