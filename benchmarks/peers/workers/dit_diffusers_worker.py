"""A plain PyTorch loop over diffusers' LTX-Video transformer, for dit_step_time.py."""

from __future__ import annotations

import math

import protocol

shape = protocol.arguments()

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import LTXVideoTransformer3DModel  # noqa: E402


def main() -> None:
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    width, (frames, height, columns) = shape["heads"] * shape["head_dim"], shape["size"]
    model = LTXVideoTransformer3DModel(
        in_channels=shape["channels"],
        out_channels=shape["channels"],
        num_attention_heads=shape["heads"],
        attention_head_dim=shape["head_dim"],
        cross_attention_dim=width,
        num_layers=shape["layers"],
        caption_channels=shape["text_width"],
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if shape["torch_compile"] else model
    rows = shape["batch"]
    data = torch.randn(rows, math.prod(shape["size"]), shape["channels"])
    texts = torch.randn(rows, shape["text"], shape["text_width"])
    seen = torch.ones(rows, shape["text"])
    bfloat16 = shape["dtype"] == "bfloat16"

    def step():
        noise, time = torch.randn_like(data), torch.rand(rows)
        share = time[:, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            velocity = forward(
                hidden_states=(1 - share) * noise + share * data,
                encoder_hidden_states=texts,
                timestep=1000 * time,
                encoder_attention_mask=seen,
                num_frames=frames,
                height=height,
                width=columns,
            ).sample
        loss = torch.nn.functional.mse_loss(velocity.float(), data - noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    step()
    parameters = sum(p.numel() for p in model.parameters())
    version = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    for steps in protocol.requests(parameters, version):
        for _ in range(steps):
            step()


main()
