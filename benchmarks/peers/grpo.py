"""A GRPO step of step_jax and of peers, rollout and update apart, interleaved in one session.

All start from the same weights: a Qwen3-like decoder that is made here and exported, as
``step-jax export`` does. Each contender is the framework's own trainer (``step-jax rl``, TRL's
GRPOTrainer, Tunix's GRPOLearner) in a process and an environment of its own, held at the beginning
of a step: all stay alive and take turns, A B C A B C ..., so that a busy machine is busy for all of
them. They get the same prompts, write the same number of tokens at temperature 1 (no token ends a
text), are rewarded alike and make one step of AdamW in float32; clip 0.2, KL 0.04 of the k3 kind.
The first two steps of each are not counted: compilation is in them.

    python benchmarks/peers/grpo.py --trl-python PATH --tunix-python PATH

Before that, one trajectory with rewards, written by the starting weights, is given to each one's
own functions of advantages and loss, for a policy that is away from them: prints the differences.

STEP_JAX_TRL_PYTHON and STEP_JAX_TUNIX_PYTHON name the interpreters as well; benchmarks/rl_peers.md
says how to make the environments. Exits 1 if a bar is missed: 0.6 of the better peer's CPU-seconds
for the rollout and for the whole step, advantages and loss within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent / "workers"))
import grpo_task
from step_time import Contender

from step_jax.inference.engine import Engine
from step_jax.inference.requests import Request
from step_jax.inference.sampling import SamplingConfig
from step_jax.interop.hf import save_hf
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.tokenizers.huggingface import character_tokenizer

SPEED_BAR, CLOSE = 0.6, 1e-5
PHASES = {"rollout": "rollout", "learning": "rest of the step", "": "whole step"}


def decoder(a: argparse.Namespace) -> Decoder:
    rope = Rope(1e6)  # of Tunix's Qwen3 whatever its configuration says
    attention = MHA(a.heads, a.head_dim, a.kv_heads, qk_norm=RMSNorm(), position=rope)
    block = Block(attention, SwiGLU(a.hidden))
    groups = (Group(a.layers, (block,)),)
    return Decoder(a.width, groups, len(grpo_task.CHARACTERS), init=Fixed(0.05))  # no head of zeros


def prepared(a: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Writes weights, problems and a trajectory; where they are."""
    model, rng = decoder(a), np.random.default_rng(0)
    start = jax.jit(model.initialise)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    policy = [x + 3e-3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    policy = jax.tree.unflatten(tree, policy)
    character_tokenizer(grpo_task.CHARACTERS).save(folder / "tokenizer")
    for name, params in (("start", start), ("policy", policy)):
        save_hf(
            folder / name, params, model, dtype="float32", context_length=a.prompt + a.new,
            tokenizer_folder=folder / "tokenizer",
        )  # fmt: skip
    prompts = rng.choice(list(grpo_task.CHARACTERS), (64, a.prompt))
    lines = [json.dumps({"question": "".join(p)}) for p in prompts]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    (folder / "trajectory.json").write_text(json.dumps(trajectory(a, model, start, rng)))
    names = {"start": "start", "policy": "policy"}
    names |= {"problems": "problems.jsonl", "trajectory": "trajectory.json"}
    return {name: str(folder / file) for name, file in names.items()}


def trajectory(a: argparse.Namespace, model: Decoder, params, rng) -> list[dict]:
    """Groups of answers of all lengths to prompts of all lengths.

    Rewards are hundreds apart: what is added to their deviation before it divides (1e-4 in step_jax
    and TRL, 1e-6 in Tunix) is then below what is compared. Token 0 is left to padding, from which
    Tunix makes its masks.
    """
    engine = Engine(
        model, SamplingConfig(), slots=16, max_length=a.prompt + a.new,
        stop_ids=(0,), execution=Execution(dtype="float32"),
    )  # fmt: skip
    vocab, asked = len(grpo_task.CHARACTERS), []
    for i in range(a.prompts):
        prompt = rng.integers(1, vocab, rng.integers(a.prompt // 2, a.prompt + 1)).tolist()
        lengths = rng.integers(1, a.new + 1, a.group).tolist()
        asked += [Request(prompt, new, (i, j)) for j, new in enumerate(lengths)]
    written = sorted(engine.run(params, asked), key=lambda done: done.request.name)
    rows = []
    for done in written:
        tokens = [token for token in done.tokens if token] or [1]
        rows.append(
            {
                "prompt": list(done.request.prompt),
                "tokens": tokens,
                "logprobs": done.logprobs[: len(tokens)].tolist(),
                "reward": float(np.float32(rng.normal() * 300)),
            }
        )
    return rows


def contenders(a: argparse.Namespace, shape: dict) -> list[Contender]:
    entries = [("step_jax", sys.executable, "grpo_step_jax_worker.py", shape)]
    if a.trl_python:
        entries.append(("trl", a.trl_python, "grpo_trl_worker.py", shape))
    if a.tunix_python:
        entries.append(("tunix", a.tunix_python, "grpo_tunix_worker.py", shape))
    return [Contender(*entry, a.logs) for entry in entries]


def compared(running: list[Contender]) -> bool:
    """Prints what each made of the trajectory; whether all are as close as they should be."""
    ours, close = running[0].about["numbers"], True
    print(
        "| contender | loss | norm of the gradient | advantages, loss, norm: away from step_jax's |"
    )
    print("|---|---|---|---|")
    for c in running:
        n = c.about["numbers"]
        gaps = [np.max(np.abs(np.subtract(n["advantages"], ours["advantages"])))]
        gaps += [abs(n[key] - ours[key]) for key in ("loss", "gradient")]
        close &= bool(max(gaps[:2]) <= CLOSE)
        shown = ", ".join(f"{gap:.1e}" for gap in gaps)
        print(f"| {c.name} | {n['loss']:.7f} | {n['gradient']:.6f} | {shown} |")
    return close


def seconds(c: Contender, phase: str, kind: str) -> list[float]:
    """Of every turn, a step's."""
    if phase == "learning":
        return [r[kind] - r[f"rollout_{kind}"] for r in c.results]
    return [r[f"{phase}_{kind}" if phase else kind] for r in c.results]


def timed(running: list[Contender]) -> dict[str, float]:
    """Prints the figures; phase -> the median of step_jax's CPU-seconds by the better peer's."""
    ours, found = running[0], {}
    print("\n| phase | contender | CPU-s | step_jax by it (range) | wall s | versions |")
    print("|---|---|---|---|---|---|")
    for phase, name in PHASES.items():
        own = seconds(ours, phase, "cpu")
        for c in running:
            cpu, wall = seconds(c, phase, "cpu"), seconds(c, phase, "wall")
            ratios = [x / y for x, y in zip(own, cpu, strict=True)]  # neighbours in time
            middle = statistics.median(ratios)
            if c is not ours:
                found[phase] = max(found.get(phase, 0.0), middle)
            print(
                f"| {name} | {c.name} | {statistics.median(cpu):.3f} | {middle:.3f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | {statistics.median(wall):.3f} | "
                f"{c.about['version']} |"
            )
    return found


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--trl-python", default=os.environ.get("STEP_JAX_TRL_PYTHON"))
    p.add_argument("--tunix-python", default=os.environ.get("STEP_JAX_TUNIX_PYTHON"))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=1, help="steps in a turn")
    p.add_argument("--logs", type=pathlib.Path, help="directory for what the workers print")
    sizes = {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 768}
    sizes |= {"prompts": 8, "group": 8, "prompt": 16, "new": 64}
    for name, value in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    a = p.parse_args()
    a.shape = {name: getattr(a, name) for name in (*sizes, "threads")} | {"kl": 0.04, "rate": 1e-5}
    return a


def main() -> int:
    a = parse()
    if a.logs:
        a.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shape = a.shape | prepared(a, pathlib.Path(folder))
        running = contenders(a, shape)
        counts = {c.name: c.about["parameters"] for c in running}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the contenders do not train the same model: parameters {counts}")
        for _ in range(a.rounds):
            for c in running:
                c.run(a.steps)
        print(f"shape: {a.shape}, {counts['step_jax']:,} parameters")
        print("CPU-s before: " + ", ".join(f"{c.name} {c.about['started']:.1f}" for c in running))
        print(f"{a.rounds} rounds of {a.steps} steps; medians\n")
        close, found = compared(running), timed(running)
        for c in running:
            c.close()
    fast = all(found.get(phase, 0.0) <= SPEED_BAR for phase in ("rollout", ""))
    return 0 if close and fast else 1


if __name__ == "__main__":
    raise SystemExit(main())
