"""What serving a recipe's decoder asks of a pod: the engine's two halves, compiled for it.

Reading prompts is bound by operations, writing tokens by the parameters and caches that every token
reads (of a mixture all experts, which takes texts enough). All figures are bounds of the compiled
programs (``planning.roofline``), none is a forecast.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.inference.engine import bytes_of_a_slot, slots_in
from step_jax.inference.requests import MARKS
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.slots import Decoding
from step_jax.models.text.decoder import Decoder
from step_jax.planning import collectives, hlo, operations, roofline
from step_jax.planning.compiled import Loop, dumped, execution_of, parsed, resolved
from step_jax.planning.report import gigabytes
from step_jax.planning.topology import Topology, crosses_slices
from step_jax.runs.console import Console, duration, si

#: Share of a device's memory that parameters and caches may fill; the rest is for what comes and
#: goes, and the prompts under way.
FILLED = 0.8


@dataclass(frozen=True)
class Half:
    """One of the programs; figures of one device and call (of writing: one token a slot).

    memory: bytes that it takes in all; None if it does not fit.
    flops, traffic, compute_s, memory_s, network_s, bound_s, bound_by: see ``planning.plan.Plan``.
    """

    memory: int | None
    flops: float
    traffic: float
    compute_s: float
    memory_s: float
    network_s: dict[str, float]
    bound_s: float
    bound_by: str
    compile_cpu_s: float
    notes: list[str]


@dataclass(frozen=True)
class Serving:
    """Everything that ``step-jax plan --serve`` says.

    Attributes:
      recipe, topology, devices, chips, mesh, memory_limit: see ``planning.plan.Plan``.
      parameters: bytes of them on a device.
      slot: bytes of the cache of one text on the devices that share it, each.
      slots: texts under way, on all devices.
      length: tokens of a text that a slot has room for.
      prompt, prompts: tokens of a prompt, and how many are read in one call: one for every part of
        the mesh that has rows of its own.
      read, write: the halves.
      first_token_s: reading a prompt and one step of writing.
      tokens_per_s: of all slots with full caches.
    """

    recipe: str
    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    memory_limit: float | None
    parameters: int
    slot: int
    slots: int
    length: int
    prompt: int
    prompts: int
    read: Half
    write: Half

    @property
    def first_token_s(self) -> float:
        return self.read.bound_s + self.write.bound_s

    @property
    def tokens_per_s(self) -> float:
        return self.slots / self.write.bound_s

    @property
    def fits(self) -> bool:
        used = self.read.memory, self.write.memory
        return None not in used and (
            self.memory_limit is None or max(m for m in used if m) <= self.memory_limit
        )

    def save(self, path: Path) -> None:
        derived = {"first_token_s": self.first_token_s, "tokens_per_s": self.tokens_per_s}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self) | derived, indent=1) + "\n", "utf-8")


def make_serving(
    loop: Loop,
    config: Any,
    topology: Topology,
    recipe: str = "",
    *,
    prompt: int,
    length: int,
    slots: int = 0,
) -> Serving:
    """Compiles reading and writing of a configuration's decoder for a topology.

    Args:
      slots: 0 for as many as fit beside the parameters.

    Raises:
      ConfigError: a recipe without a decoder, a mesh that does not fit, no room for a slot.
    """
    config = resolved(config, topology.count)
    sharding = Sharding.build(config.parallel, topology.devices)
    models = loop.program(config, sharding).models.values()
    decoder = next((model for model in models if isinstance(model, Decoder)), None)
    execution = execution_of(config)
    if decoder is None or execution is None:
        raise ConfigError("--serve is for recipes of a decoder")
    if prompt >= length:
        raise ConfigError(f"a prompt of {prompt} tokens leaves no room in {length}")
    # recomputing is for gradients
    execution = dataclasses.replace(execution, remat="none")
    decoding = Decoding.of(decoder, length, execution, sharding, None)
    params = _params(decoding)
    held = sum(_on_device(a) for a in jax.tree.leaves(params))
    limit = topology.chip.hbm_bytes if topology.chip else None
    cache_dtype, ways = decoding.cache_dtype, sharding.ways("batch")
    if not slots:
        room = 0 if limit is None else max(0, int(FILLED * limit - held))
        slots = slots_in(room, decoder, length, cache_dtype, sharding)
    if slots < 1 or slots % ways:
        raise ConfigError(
            f"{slots} slots: they are to be a multiple of the {ways} parts of the mesh that have "
            f"rows of their own (parameters take {gigabytes(held)} of a device, a slot of {length} "
            f"tokens {gigabytes(bytes_of_a_slot(decoder, length, cache_dtype, sharding))}); say "
            "how many: --slots N"
        )
    slot = bytes_of_a_slot(decoder, length, cache_dtype, sharding)
    stock = functools.partial(_half, topology=topology, mesh=sharding.mesh, dtype=execution.dtype)
    return Serving(
        recipe=recipe,
        topology=topology.name,
        devices=topology.count,
        chips=topology.chips,
        mesh={a: n for a, n in sharding.mesh.shape.items() if n > 1},
        memory_limit=limit,
        parameters=held,
        slot=slot,
        slots=slots,
        length=length,
        prompt=prompt,
        prompts=ways,
        read=stock(*_reading(decoding, params, ways, prompt), read=held),
        write=stock(*_writing(decoding, params, slots), read=held + slots // ways * slot),
    )


def _params(decoding: Decoding):
    """Shapes and layouts of the parameters in the compute dtype."""
    specs, sharding = decoding.decoder.specs(), decoding.sharding
    assert sharding is not None
    cast = jax.eval_shape(decoding.cast, spec_lib.abstract(specs))
    return jax.tree.map(_laid_out, cast, sharding.params(specs))


def _laid_out(a, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)


def _on_device(a: jax.ShapeDtypeStruct) -> int:
    assert a.sharding is not None
    return int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize


def _reading(decoding: Decoding, params, rows: int, prompt: int):
    """(name, lowered program) of reading so many prompts."""
    program = decoding.programs().read
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return "read", program.lower(params, integers((rows, prompt)), integers((rows,)), prompt)


def _writing(decoding: Decoding, params, slots: int):
    """(name, lowered program) of writing in so many slots."""
    empty = jax.eval_shape(lambda: decoding.empty(slots, MARKS))
    like = jax.tree.map(_laid_out, empty, decoding.layout())
    one = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = decoding.programs().advance.lower(
        params, like, one, one, sampling=SamplingConfig(), columns=32, thinking=False
    )
    return "advance", lowered


def _half(name: str, lowered, *, read: float, topology: Topology, mesh, dtype: str) -> Half:
    """Takes stock of a program; a loop of unknown length, over tokens, counts one turn.

    Args:
      read: bytes of parameters and caches that it cannot but read.
    """
    found = dumped(lambda options: lowered.compile(compiler_options=options), name, topology)
    module = parsed(found)
    executions, _ = hlo.executions(module)
    across = next((a for a in mesh.axis_names if crosses_slices(mesh, [a])), None)
    slices = (across, topology.slices) if across else None
    sent = collectives.communication(module, executions, dict(mesh.shape), slices)
    ops = operations.count(module, executions, caches=True)
    bound = roofline.bound(ops.flops, read, sent, topology, mesh, dtype)
    notes = [f"the compiler gave up: {found.overflow.splitlines()[0]}"] if found.overflow else []
    if ops.silent_kernels:
        notes.append(f"kernels without a declared cost: {', '.join(ops.silent_kernels)}")
    return Half(
        memory=found.memory_bytes,
        flops=ops.flops,
        traffic=ops.traffic,
        compute_s=bound.compute,
        memory_s=bound.memory,
        network_s=bound.network,
        bound_s=bound.step,
        bound_by=bound.by,
        compile_cpu_s=found.compile_seconds,
        notes=notes,
    )


def show(serving: Serving, console: Console) -> None:
    """Prints it as tables."""
    s = serving
    mesh = " x ".join(f"{a}={n}" for a, n in s.mesh.items()) or "1 device"
    limit = "" if s.memory_limit is None else f" of {gigabytes(s.memory_limit)}"
    console.table(
        f"{s.recipe or 'recipe'} served on {s.topology}",
        {
            "chips": f"{s.chips:,} ({s.devices:,} devices): {mesh}",
            "parameters": f"{gigabytes(s.parameters)}{limit} of a device",
            "a slot": f"{gigabytes(s.slot)}: {s.slot // s.length:,} bytes for each of {s.length:,}",
            "slots": f"{s.slots:,} on {s.devices:,} devices",
        },
    )
    titles = {
        f"reading {s.prompts:,} prompts of {s.prompt:,} tokens": s.read,
        f"writing a token in each of {s.slots:,} slots with full caches": s.write,
    }
    for title, half in titles.items():
        rows = {
            "memory": "DOES NOT FIT" if half.memory is None else gigabytes(half.memory) + limit,
            "compute": f"{duration(half.compute_s)} ({si(half.flops)}FLOP)",
            "parameters and caches": duration(half.memory_s),
            "memory traffic": f"{si(half.traffic)}B, were everything written and read",
        }
        for axes, seconds in half.network_s.items():
            if seconds >= 1e-3 * half.bound_s:
                rows[f"network: {axes}"] = duration(seconds)
        rows["bound"] = f"{duration(half.bound_s)}, by {half.bound_by}"
        console.table(title, rows)
        for note in half.notes:
            console.line(f"note: {note}")
    console.table(
        "roofline: bounds, not forecasts",
        {
            f"first token of {s.prompt:,}": duration(s.first_token_s),
            "tokens a second": f"{s.tokens_per_s:,.0f}, {s.tokens_per_s / s.chips:,.0f} a chip",
            "a text": f"{1 / s.write.bound_s:,.1f} tokens a second",
        },
    )
