"""Memory of the loss and its gradients at a large vocabulary, chunked against full logits.

    python benchmarks/loss_memory.py [--vocab 131072] [--width 1024] [--rows 4] [--length 2048]

Compiles value-and-gradient (with respect to hidden states and head, bf16) and prints the
compiler's own count of temporary bytes; nothing is executed. The float32 gradient of the head,
which exists in any case, is counted on both sides and shown apart. Exits 1 if the recommended
number of chunks needs more than a quarter of full logits.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from step_jax.models.context import Execution
from step_jax.ops.cross_entropy import cross_entropy

BAR = 1 / 4


def full_logits(x_BTD, w_DV, targets_BT, weights_BT):
    """What a plain implementation does: all logits in float32, differentiated by JAX."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, w_DV, preferred_element_type=jnp.float32)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    nll_BT = -jnp.take_along_axis(logp_BTV, targets_BT[..., None], -1)[..., 0]
    return jnp.sum(weights_BT * nll_BT)


def temporary_bytes(f, rows: int, length: int, width: int, vocab: int) -> int:
    """Peak temporary bytes of ``f`` and its gradients with respect to its first two arguments."""
    shapes = (
        ((rows, length, width), jnp.bfloat16),
        ((width, vocab), jnp.bfloat16),
        ((rows, length), jnp.int32),
        ((rows, length), jnp.float32),
    )
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    a = parser.parse_args()
    shape = (a.rows, a.length, a.width, a.vocab)
    recommended = Execution().loss_chunks

    print(f"jax {jax.__version__}, {jax.default_backend()}; {a.rows} x {a.length} tokens, ", end="")
    print(f"width {a.width}, vocabulary {a.vocab:,}")
    print(f"float32 logits {4e-9 * a.rows * a.length * a.vocab:8.3f} GB")
    print(f"float32 dw     {4e-9 * a.width * a.vocab:8.3f} GB\n")
    full = temporary_bytes(full_logits, *shape)
    print(f"{'loss':<14} {'temporary GB':>12} {'of full':>8}")
    print(f"{'full logits':<14} {full / 1e9:12.3f} {1:8.3f}")
    ratios = {}
    for chunks in sorted({1, 2, 4, 8, 16, 32, recommended}):
        need = temporary_bytes(lambda *x, n=chunks: cross_entropy(*x, chunks=n)[0], *shape)
        ratios[chunks] = need / full
        mark = "  <- default" if chunks == recommended else ""
        print(f"{f'{chunks} chunks':<14} {need / 1e9:12.3f} {need / full:8.3f}{mark}")
    ok = ratios[recommended] <= BAR
    print(f"\nbar: {BAR} of full logits at {recommended} chunks: {'met' if ok else 'MISSED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
