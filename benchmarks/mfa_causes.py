"""What moves MFA's loss: one change at a time, against the same model without it.

    python benchmarks/mfa_causes.py OUT [--cases mha mfa] [--seeds 0 1 2] [--steps 200]

Width 256, C = 32, two layers, 1,024 tokens a step of the Python standard library, Muon at 1e-2
unless the case says otherwise. What is finished is kept in OUT/results.jsonl, and the same command
goes on with the rest; it ends with a table of held-out losses, paired by seed with those of ``mfa``
and ``mha``. The parameters of every run are left in OUT as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.kept_programs import kept
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import ZEROS, Normal, ParamSpec
from step_jax.data import DataConfig, TextDataset
from step_jax.data.batches import to_mesh
from step_jax.data.packing import text_schema
from step_jax.evaluation.heldout import make_evaluator
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.attention.mfa import MFAParams
from step_jax.models.layers.block import Block
from step_jax.models.layers.initialisation import FanIn, Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope, rotate, rotate_queries
from step_jax.models.text.decoder import Decoder
from step_jax.models.trunk import Group
from step_jax.ops.einsum import einsum
from step_jax.runs.plots import plot_groups
from step_jax.trainers.ablation_table import Row, difference
from step_jax.training.learner import learn
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.config import AdamW, Muon
from step_jax.training.program import Program, Work
from step_jax.training.schedules import Cosine

WIDTH, C, HIDDEN, LAYERS, ROWS, T = 256, 32, 344, 2, 16, 64
HELDOUT = 50_000  # tokens, whole documents
MFA26 = MFA(heads=26, head_dim=C)
Change = Callable[[str, ParamSpec], ParamSpec]


@dataclass(frozen=True)
class NormedMFA(MFA):
    """MFA whose keys and heads' queries have the root mean square 1 before they are rotated."""

    def apply(self, p: MFAParams, x_BTD, ctx, cache=None):
        q_BTNC = einsum("BTD,DR,RNC->BTNC", x_BTD, p.query_down_DR, p.query_up_RNC)
        k_BTC = einsum("BTD,DC->BTC", x_BTD, p.key_DC)
        places_BTA = ctx.tokens.places_BTA
        q_BTNC = rotate_queries(self.position, _unit(q_BTNC), places_BTA)
        k_BTC = rotate(self.position, _unit(k_BTC)[:, :, None], places_BTA)[:, :, 0]
        v_BTC = einsum("BTD,DC->BTC", x_BTD, p.value_DC)
        o_BTNC = self._attend(q_BTNC, k_BTC, v_BTC, ctx, None)
        return einsum("BTNC,NCD->BTD", o_BTNC, p.output_NCD), None


def _unit(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


@dataclass(frozen=True)
class PerHead(ParamSpec):
    """An output weight (layers, N, C, D) that Muon sees as a matrix of each head."""

    @property
    def matrix_shape(self):
        layers, heads, rows, columns = self.shape
        return (layers, heads), rows, columns


@dataclass(frozen=True)
class AlikeHeads:
    """A query weight (R, N, C) whose heads all start as the same matrix."""

    std: float

    def __call__(self, key, shape, dtype, layer=0):
        R, N, width = shape
        one = jax.random.normal(key, (R, 1, width), jnp.float32) * self.std
        return jnp.broadcast_to(one, shape).astype(dtype)


@dataclass(frozen=True)
class Changed(Decoder):
    """A decoder whose parameter table is changed by its parameters' paths."""

    change: Change = lambda name, spec: spec

    def specs(self):
        def leaf(path, spec):
            return self.change(spec_lib.path_name(path), spec)

        return jax.tree_util.tree_map_with_path(leaf, super().specs(), is_leaf=spec_lib.is_spec)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      change: of the parameter table.
    """

    attention: MFA | MHA = MFA26
    change: Change = lambda name, spec: spec
    init: FanIn | Fixed = FanIn()
    optimizer: type = Muon
    rate: float = 1e-2
    warmup: int = 20


def start(**inits) -> Change:
    """The parameters of the given names start otherwise."""

    def change(name: str, spec: ParamSpec) -> ParamSpec:
        init = inits.get(name.rsplit("/", 1)[-1])
        return spec if init is None else replace(spec, init=init)

    return change


def scaled(**factors) -> Change:
    """The deviations of the parameters of the given names are multiplied."""

    def change(name: str, spec: ParamSpec) -> ParamSpec:
        factor = factors.get(name.rsplit("/", 1)[-1])
        return spec if factor is None else replace(spec, init=Normal(spec.init.std * factor))

    return change


def rated(**factors) -> Change:
    """The learning rates of the parameters of the given names are multiplied."""

    def change(name: str, spec: ParamSpec) -> ParamSpec:
        return replace(spec, rate=factors.get(name.rsplit("/", 1)[-1], 1.0))

    return change


def per_head(name: str, spec: ParamSpec) -> ParamSpec:
    if not name.endswith("output_NCD"):
        return spec
    return PerHead(spec.shape, spec.axes, spec.init, fan_in=2)


NORM = RMSNorm()
SHARED = ("query_down_DR", "key_DC", "value_DC")
FAN = WIDTH / (26 * C)  # the model's width by that of all heads
MHA16, MQA15 = MHA(16, 16), MHA(15, C, kv_heads=1)
CASES: dict[str, Case] = {
    "mha": Case(MHA16),
    "mqa": Case(MQA15),
    "mfa": Case(),
    "mfa_8_heads": Case(replace(MFA26, heads=8)),
    "mfa_output_rate": Case(change=rated(output_NCD=FAN)),
    "mfa_output_rate_squared": Case(change=rated(output_NCD=FAN**2)),
    "mfa_output_rate_cubed": Case(change=rated(output_NCD=FAN**3)),
    "mha_output_rate_squared": Case(MHA16, change=rated(output_NHD=FAN**2)),
    "mfa_half_rate": Case(rate=5e-3),
    "mha_half_rate": Case(MHA16, rate=5e-3),
    "mfa_output_rate_query_norm": Case(
        replace(MFA26, query_norm=NORM), change=rated(output_NCD=FAN)
    ),
    "mfa_query_norm": Case(replace(MFA26, query_norm=NORM)),
    "mfa_output_starts": Case(change=start(output_NCD=Normal((26 * C) ** -0.5))),
    "mfa_qk_norm": Case(NormedMFA(heads=26, head_dim=C)),
    "mfa_per_head": Case(change=per_head),
    "mfa_shared_rates_third": Case(change=rated(**dict.fromkeys(SHARED, 1 / 3))),
    "mfa_rank_128": Case(replace(MFA26, heads=16, query_rank=128)),
    "mfa_rank_128_norm": Case(replace(MFA26, heads=16, query_rank=128, query_norm=NORM)),
    "mqa_output_rate": Case(MQA15, change=rated(output_NHD=WIDTH / (15 * C))),
    "mqa_output_rate_squared": Case(MQA15, change=rated(output_NHD=(WIDTH / (15 * C)) ** 2)),
    "mqa_output_rate_cubed": Case(MQA15, change=rated(output_NHD=(WIDTH / (15 * C)) ** 3)),
    "mfa_half_rotated": Case(replace(MFA26, position=Rope(fraction=0.5))),
    "mfa_fixed": Case(init=Fixed(0.02)),
    "mfa_alike": Case(change=start(query_up_RNC=AlikeHeads(C**-0.5))),
    "mfa_query_up_half": Case(change=scaled(query_up_RNC=0.5)),
    "mfa_query_up_double": Case(change=scaled(query_up_RNC=2.0)),
    "mfa_key_half": Case(change=scaled(key_DC=0.5)),
    "mfa_query_up_zero": Case(change=start(query_up_RNC=ZEROS)),
    "mfa_theta_500": Case(replace(MFA26, position=Rope(theta=500.0))),
    "mfa_warmup_60": Case(warmup=60),
    "mha_output_rate": Case(MHA16, change=rated(output_NHD=FAN)),
    "mha_adamw": Case(MHA16, optimizer=AdamW, rate=5e-3),
    "mfa_adamw": Case(optimizer=AdamW, rate=5e-3),
    "mfa_adamw_output_rate": Case(optimizer=AdamW, rate=5e-3, change=rated(output_NCD=FAN)),
}
#: case -> its name in the picture
DRAWN = {
    "mfa": "MFA",
    "mqa": "MQA",
    "mha": "MHA",
    "mfa_output_rate_squared": "MFA, output_rate 0.095",
    "mha_output_rate": "MHA, output_rate 0.31",
}


def train(case: Case, seed: int, steps: int, dataset: TextDataset, sharding: Sharding):
    """(held-out figures, losses of the steps, parameters)."""
    execution = Execution(dtype="float32", loss_chunks=1)
    model = Changed(
        WIDTH,
        (Group(LAYERS, (Block(case.attention, SwiGLU(HIDDEN)),)),),
        vocab=dataset.tokenizer.vocab_size,
        init=case.init,
        change=case.change,
    )
    optimizer = case.optimizer(learning_rate=case.rate, schedule=Cosine(warmup_steps=case.warmup))
    learning = learn(model, optimizer, total_steps=steps, sharding=sharding)
    text_loss = packed_text_loss(model, execution, sharding)
    program = Program.build(
        lambda params, batch, key: text_loss(params["model"], batch),
        {"model": model},
        {"model": learning},
        text_schema(ROWS, T),
        sharding,
        total_steps=steps,
        work=Work(ROWS * T),
        seed=seed,
    )
    step = program.compile()
    state = program.initial_state(rng.fold(seed, 0, "parameters"))
    losses, batches = [], dataset.iterate(0)
    for _ in range(steps):
        state, metrics = step(state, to_mesh(sharding, program.schema, next(batches)))
        losses.append(float(metrics["loss"]))
    batches.close()
    params = state.learners["model"].params
    evaluate = make_evaluator(model, execution, sharding, ROWS, T)
    return (
        evaluate(params, dataset.heldout.subset(HELDOUT)),
        losses,
        params,
        spec_lib.count(model.specs()),
    )


def run(out: Path, names: list[str], seeds: list[int], steps: int) -> list[dict[str, Any]]:
    """Trains what is missing in ``out``; returns all its results."""
    sharding = Sharding.build(MeshConfig())
    with kept(sharding.mesh):
        return _run(out, names, seeds, steps, sharding)


def _run(out: Path, names: list[str], seeds: list[int], steps: int, sharding: Sharding):
    """As ``run``, on a mesh of one device."""
    config = DataConfig(
        path="python:stdlib", vocab_size=1024, sequence_length=T, heldout_fraction=0.01
    )
    file = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["case"], r["seed"], r["steps"]) for r in results}
    for seed in seeds:
        dataset = TextDataset.build(config, batch_size=ROWS, seed=seed)
        for name in names:
            if (name, seed, steps) in done:
                continue
            begin = time.process_time()
            figures, losses, params, parameters = train(CASES[name], seed, steps, dataset, sharding)
            arrays = {spec_lib.path_name(p): a for p, a in jax.tree.leaves_with_path(params)}
            np.savez(out / f"{name}-{seed}-{steps}.npz", **arrays)
            result = {
                "case": name,
                "seed": seed,
                "steps": steps,
                "tokens": steps * ROWS * T,
                "nll": figures["nll"],
                "parameters": parameters,
                "losses": [round(x, 4) for x in losses],
                "cpu_seconds": round(time.process_time() - begin, 1),
            }
            results.append(result)
            with file.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            print(
                f"{name}, seed {seed}: {result['nll']:.4f} ({result['cpu_seconds']} CPU-s)",
                flush=True,
            )
    return results


def table(results: list[dict[str, Any]], steps: int) -> str:
    """Losses by case, and minus those of ``mfa`` and ``mha`` over pairs of the same seed."""
    nll: dict[str, dict[int, float]] = {}
    for r in results:
        if r["steps"] == steps:
            nll.setdefault(r["case"], {})[r["seed"]] = r["nll"]
    rows = {name: Row(name, 0, (), 0.0, losses, {}) for name, losses in nll.items()}
    lines = ["| case | seeds | held-out loss | minus mfa | minus mha |"]
    lines.append("| :-- | --: | --: | --: | --: |")
    for name in (name for name in CASES if name in rows):
        cells = [name, str(len(nll[name])), f"{statistics.fmean(nll[name].values()):.4f}"]
        for other in ("mfa", "mha"):
            gap = difference(rows[name], rows[other]) if other in rows and name != other else None
            cells.append("-" if gap is None else str(gap))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], steps: int, out: Path) -> Path:
    """Training loss of the cases in ``DRAWN``: mean and range over seeds."""
    groups: dict[str, list[Path]] = {}
    for r in results:
        if r["steps"] == steps and r["case"] in DRAWN:
            file = out / "curves" / f"{r['case']}-{r['seed']}-{steps}.jsonl"
            file.parent.mkdir(exist_ok=True)
            records: list[dict[str, Any]] = [
                {"event": "header", "step": 0, "units": {"loss": "nats per token"}}
            ]
            records += [
                {"event": "step", "step": i, "tokens": i * ROWS * T, "tokens_per_s": 0, "loss": x}
                for i, x in enumerate(r["losses"], start=1)
            ]
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
            seeds = groups.setdefault(DRAWN[r["case"]], [])
            seeds.append(file)
    labels = {
        name: f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})" for name, runs in groups.items()
    }
    title = f"width 256, C = 32, Muon, {steps * ROWS * T:,} tokens, mean and range over seeds"
    drawn = {labels[name]: groups[name] for name in DRAWN.values() if name in groups}
    return plot_groups(drawn, out / "causes.png", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    results = run(args.out, args.cases, args.seeds, args.steps)
    print(table(results, args.steps))
    print(f"\npicture: {picture(results, args.steps, args.out)}")


if __name__ == "__main__":
    main()
