"""What serving a recipe's decoder asks of a pod: the engine's two halves, compiled for it.

Reading prompts is bound by operations, writing tokens by the parameters and caches that every token
reads (of a mixture all experts, which takes texts enough). All figures are bounds of the compiled
programs (``planning.roofline``), none is a forecast.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding, bytes_on_device
from step_jax.inference.engine import bytes_of_a_slot, slots_in
from step_jax.inference.phases import abstract_params, reading, writing
from step_jax.inference.slots import Decoding
from step_jax.models.text.decoder import Decoder
from step_jax.planning.compiled import Loop, execution_of, resolved
from step_jax.planning.phases import Stock, take_stock
from step_jax.planning.report import gigabytes
from step_jax.planning.topology import Topology
from step_jax.runs.console import Console, duration, si

#: Share of a device's memory that parameters and caches may fill; the rest is for what comes and
#: goes, and the prompts under way.
FILLED = 0.8


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
    read: Stock
    write: Stock

    @property
    def first_token_s(self) -> float:
        return self.read.bound_s + self.write.bound_s

    @property
    def tokens_per_s(self) -> float:
        return self.slots / self.write.bound_s

    @property
    def fits(self) -> bool:
        return not any(stock.misfit(self.memory_limit) for stock in (self.read, self.write))

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
    sharding = Sharding.build(config.parallel, topology.devices).for_inference()
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
    held = bytes_on_device(abstract_params(decoding))
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
    halves = (reading(decoding, ways, prompt), writing(decoding, slots))
    read, write = (take_stock(half, topology, execution.dtype) for half in halves)
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
        read=read,
        write=write,
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
    for title, stock in ((s.read.name, s.read), (f"{s.write.name} with full caches", s.write)):
        rows = {
            "memory": "DOES NOT FIT" if stock.memory is None else gigabytes(stock.memory) + limit,
            "compute": f"{duration(stock.compute_s)} ({si(stock.flops)}FLOP)",
            "parameters and caches": duration(stock.memory_s),
            "memory traffic": f"{si(stock.traffic)}B, were everything written and read",
        }
        for axes, seconds in stock.network_s.items():
            if seconds >= 1e-3 * stock.bound_s:
                rows[f"network: {axes}"] = duration(seconds)
        rows["bound"] = f"{duration(stock.bound_s)}, by {stock.bound_by}"
        console.table(title, rows)
        for note in stock.notes:
            console.line(f"note: {note}")
    console.table(
        "roofline: bounds, not forecasts",
        {
            f"first token of {s.prompt:,}": duration(s.first_token_s),
            "tokens a second": f"{s.tokens_per_s:,.0f}, {s.tokens_per_s / s.chips:,.0f} a chip",
            "a text": f"{1 / s.write.bound_s:,.1f} tokens a second",
        },
    )
