"""Continuous against static batching, rows in the same memory, and what a turn costs the host.

    python benchmarks/engine.py [--slots 16] [--requests 512] [--rounds 3]

1. Answers whose lengths spread 32 times (8 to 256 tokens, uniform in the logarithm, in an order
   that helps nobody): all requests given to the engine, against batches of as many requests as
   there are slots, each written to its longest answer, by the same compiled programs in turn.
2. Slots for texts of 32,768 tokens in 64 GiB, by attention kind, and whether an engine's cache has
   the bytes that were computed.
3. CPU time of the calling thread for a turn without a token: call, results, bookkeeping.
4. Log-probabilities of sampled tokens against those of one forward pass over the whole text, as a
   trainer makes it, in float32 (bar 1e-4) and bfloat16.

Exits 1 if a bar is missed: twice the tokens of a CPU-second, 90 % of the slots' time used, the gap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import spec as spec_lib
from step_jax.inference.engine import Engine, bytes_of_a_slot, slots_in
from step_jax.inference.requests import MARKS, Request
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens

SPEED_BAR, BUSY_BAR, GAP_BAR = 2.0, 0.9, 1e-4
TEMPERATURE = 0.8
SHORTEST, LONGEST, PROMPT = 8, 256, 16
EXECUTION = Execution(dtype="float32")


def decoder(attention, width: int = 128, depth: int = 2, vocab: int = 512) -> Decoder:
    groups = (Group(depth, (Block(attention, SwiGLU(2 * width)),)),)
    return Decoder(width, groups, vocab, init=Fixed(0.05))  # a head of zeros would hide all gaps


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    budgets = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).round().astype(int)
    prompts = rng.integers(0, 512, (count, PROMPT))
    return [
        Request(prompt.tolist(), int(budget), (i,))
        for i, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]


def written(engine: Engine, params, batches) -> tuple[dict[tuple, list[int]], int, float]:
    """(texts by name, steps of the slots, CPU-seconds) of batches one after the other."""
    start, texts, steps = time.process_time(), {}, 0
    for batch in batches:
        for completion in engine.run(params, batch):
            texts[completion.request.name] = completion.tokens
        steps += engine.stats.steps
    return texts, steps, time.process_time() - start


def batching(slots: int, count: int, rounds: int) -> bool:
    c = decoder(MFA(8, 32, value="gated_key"))
    params, asked = c.initialise(jax.random.key(0)), requests(count)
    engine = Engine(
        c, SamplingConfig(), slots=slots, max_length=PROMPT + LONGEST, execution=EXECUTION
    )
    static = [asked[i : i + slots] for i in range(0, count, slots)]
    for several in (1 << n for n in range(slots.bit_length())):  # every shape is compiled
        written(engine, params, [[replace(r, max_new_tokens=1) for r in asked[:several]]])
    ratios, shown = [], {}
    for _ in range(rounds):
        texts, steps, spent = written(engine, params, [asked])
        total = sum(map(len, texts.values()))
        same, static_steps, static_spent = written(engine, params, static)
        equal = sum(same[name] == tokens for name, tokens in texts.items())
        ratios.append(static_spent / spent)
        shown = {"continuous": (steps, spent), "static": (static_steps, static_spent)}
        for name, (steps_, spent_) in shown.items():
            busy = total / (steps_ * slots)
            print(
                f"{name:<12} {total:8} tokens {steps_:7} steps {busy:6.1%} busy "
                f"{spent_:7.2f} CPU-s {total / spent_:9.0f} tokens per CPU-s"
            )
    print(f"{equal} of {count} texts are the same in either company")
    busy, ratio = total / (shown["continuous"][0] * slots), statistics.median(ratios)
    print(
        f"continuous by static: {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), bar "
        f"{SPEED_BAR}; busy {busy:.1%}, bar {BUSY_BAR:.0%}"
    )
    return ratio >= SPEED_BAR and busy >= BUSY_BAR


def memory(length: int = 32768, budget: int = 64 << 30, layers: int = 32) -> bool:
    kinds = {
        "MHA, 8 heads of 256": MHA(8, 256),
        "GQA, 8 heads on 4": MHA(8, 256, kv_heads=4),
        "MLA, latent 512 and 64": MLA(
            16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=512
        ),
        "MFA, 26 heads of 256": MFA(26, 256),
        "MFA-KR, 28 heads of 256": MFA(28, 256, value="gated_key"),
    }
    agree, first = True, None
    print(
        f"\n{'attention':<26} {'bytes a token':>13} {'slots':>6} {'by MHA':>7}  cache of an engine"
    )
    for name, kind in kinds.items():
        c = decoder(kind, 2048, layers)
        slots = slots_in(budget, c, length, "bfloat16")
        first = first or slots
        small = decoder(kind, 256, 1)
        engine = Engine(small, SamplingConfig(), slots=4, max_length=64, execution=EXECUTION)
        live = engine.programs.empty(4, MARKS).cache.nbytes()
        right = live == 4 * bytes_of_a_slot(small, 64, "float32")
        agree &= right
        of_token = bytes_of_a_slot(c, length, "bfloat16") // length
        print(
            f"{name:<26} {of_token:13,} {slots:6} {slots / first:7.2f}  "
            f"{'as computed' if right else 'OTHER THAN COMPUTED'}"
        )
    return agree


def turns(slots: int, calls: int = 200) -> None:
    c = decoder(MFA(8, 32, value="gated_key"), depth=16)
    engine = Engine(c, SamplingConfig(), slots=slots, max_length=64, execution=EXECUTION)
    params = c.initialise(jax.random.key(0))
    state, spent = engine.programs.empty(slots, MARKS), []
    for _ in range(calls + 5):
        start = time.thread_time()
        state, out = engine.programs.advance(
            params, state, np.int32(0), np.int32(slots), sampling=SamplingConfig(), columns=32,
            thinking=False,
        )  # fmt: skip
        jax.device_get((out, state.done_B))
        spent.append(1e3 * (time.thread_time() - start))
    spent = sorted(spent[5:])
    print(
        f"\nturn of {slots} slots, 16 layers, without a token: median "
        f"{statistics.median(spent):.3f} ms, 90th percentile {spent[int(0.9 * calls)]:.3f} ms"
    )


def gap(dtype: str, count: int = 32, new: int = 112) -> float:
    """The largest difference of a log-probability; prints the mean too."""
    c, execution = decoder(MFA(8, 32, value="gated_key"), depth=4), Execution(dtype=dtype)
    params = jax.tree.map(lambda a: 2 * a, c.initialise(jax.random.key(0)))
    engine = Engine(
        c,
        SamplingConfig(temperature=TEMPERATURE, top_p=0.95),
        slots=16,
        max_length=PROMPT + new,
        execution=execution,
    )
    asked = [Request(r.prompt, new, r.name) for r in requests(count)]
    done = list(engine.run(params, asked))
    texts_BT = np.asarray([[*d.request.prompt, *d.tokens] for d in done], np.int32)

    @jax.jit
    def trainers(params, texts_BT):
        params = spec_lib.cast(params, dtype, c.specs())
        ctx = Context(Tokens.in_order(*texts_BT.shape), execution=execution)
        logits_BTV = c.logits(params, c.hidden(params, texts_BT, ctx)[0], ctx) / TEMPERATURE
        targets_BT1 = texts_BT[:, PROMPT:, None]
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, PROMPT - 1 : -1])
        return jnp.take_along_axis(logp_BTV, targets_BT1, axis=-1)[..., 0]

    written_BN = np.stack([d.logprobs for d in done])
    gaps_BN = np.abs(np.asarray(trainers(params, texts_BT)) - written_BN)
    print(
        f"{dtype:<8} {gaps_BN.size} tokens, mean log-probability {written_BN.mean():.2f}: largest "
        f"gap {gaps_BN.max():.2e}, mean {gaps_BN.mean():.2e}"
    )
    return float(gaps_BN.max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}; {a.requests} requests, {a.slots} slots")
    fast = batching(a.slots, a.requests, a.rounds)
    right = memory()
    turns(a.slots)
    print("\nlog-probabilities, trainer against engine")
    close = gap("float32") <= GAP_BAR
    gap("bfloat16")
    return 0 if fast and right and close else 1


if __name__ == "__main__":
    raise SystemExit(main())
