"""What the expert health report costs: a train step of a mixture with it and without it.

    python benchmarks/health_cost.py [--rounds 30] [--layers 4] [--dtype float32]

Both steps train the same model on the same batch in turns of one process, first one first and then
the other, so that what else the machine does hits both. Without the report the compiler drops all
that only it needs: entropies, confidences and activations' squares of every layer, norms of every
expert's weights, medians. The report's host side (``ExpertAlarm``) is timed alone.

Exits 1 if the median of the ratios is above 1.01.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from step_jax.core import rng
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import DataConfig
from step_jax.data.packing import empty_batch
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.runs.expert_alarm import ExpertAlarm, ExpertHealth
from step_jax.runs.session import RunConfig
from step_jax.trainers import pretrain
from step_jax.trainers.text import LEARNER, Training
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.program import Program


def without_report(config: pretrain.Config, program: Program) -> Program:
    """The same program, which says nothing of its experts."""
    loss = packed_text_loss(config.model, config.execution, program.sharding)
    return Program.build(
        lambda params, batch, key: loss(params[LEARNER], batch),
        program.models,
        program.learnings,
        program.schema,
        program.sharding,
        total_steps=program.total_steps,
        work=program.work,
        seed=config.run.seed,
    )


def batch_of(config: pretrain.Config, rows: int):
    T = config.data.sequence_length
    batch = jax.tree.map(lambda a: np.array(a), empty_batch(rows, T, pad_id=0))
    tokens = np.random.default_rng(0).integers(1, config.model.vocab, (rows, T + 1))
    batch["tokens"][:], batch["targets"][:] = tokens[:, :-1], tokens[:, 1:]
    batch["positions"][:], batch["segments"][:] = np.arange(T), 1
    batch["weights"][:] = 1.0
    return batch


class Contender:
    """A step that is called again and again on what it made of its state."""

    def __init__(self, program: Program, batch):
        self.step, self.batch = program.compile(), batch
        self.state = program.initial_state(rng.fold(0, 0, "parameters"))

    def seconds(self) -> float:
        """CPU seconds of one step, its metrics read."""
        start = time.process_time()
        self.state, self.metrics = self.step(self.state, self.batch)
        self.values = {k: v.item() for k, v in jax.device_get(self.metrics).items()}
        jax.block_until_ready(self.state)
        return time.process_time() - start


def alarm_seconds(values: dict[str, float], times: int = 1000) -> float:
    alarm = ExpertAlarm(ExpertHealth())
    start = time.process_time()
    for step in range(times):
        list(alarm.check(step, values))
    return (time.process_time() - start) / times


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sizes = {"rounds": 30, "layers": 4, "width": 384, "heads": 6, "hidden": 512, "experts": 8}
    sizes |= {"top_k": 2, "vocab": 4096, "rows": 4, "length": 512}
    for name, value in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return p.parse_args()


def main() -> int:
    args = parse()
    router = Router(args.top_k, score="sigmoid", bias=True, bias_rate=1e-3)
    block = Block(MFA(args.heads, 64), MoE((Experts(args.experts, args.hidden),), router))
    config = pretrain.Config(
        run=RunConfig("unused"),
        model=Decoder(args.width, (Group(args.layers, (block,)),), args.vocab, init=Fixed(0.02)),
        training=Training(steps=10_000, batch_size=args.rows),
        data=DataConfig(sequence_length=args.length),
        execution=Execution(dtype=args.dtype),
        parallel=MeshConfig(),
    )
    sharding = Sharding.build(config.parallel, jax.devices()[:1])
    batch = jax.device_put(batch_of(config, args.rows), sharding.mesh.devices.flat[0])
    program = pretrain.program(config, sharding)
    with_it = Contender(program, batch)
    without = Contender(without_report(config, program), batch)
    for contender in (with_it, without):
        contender.seconds()
    turns = []
    for n in range(args.rounds):
        order = (with_it, without) if n % 2 else (without, with_it)
        times = {contender: contender.seconds() for contender in order}
        turns.append((times[with_it], times[without]))
    assert with_it.values["loss"] == without.values["loss"], "the report changed the step"
    ratios = sorted(a / b for a, b in turns)
    median = statistics.median(ratios)
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median
    a, b = (statistics.median(t[i] for t in turns) for i in (0, 1))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(args)}")
    print(
        f"CPU seconds of a step: {a:.4f} with the report, {b:.4f} without; ratio "
        f"{median:.4f} +- {error:.4f} (middle half {ratios[len(ratios) // 4]:.3f} to "
        f"{ratios[-len(ratios) // 4]:.3f})"
    )
    print(f"the alarm on the host: {alarm_seconds(with_it.values) * 1e6:.0f} us of CPU a step")
    return int(median > 1.01)


if __name__ == "__main__":
    sys.exit(main())
