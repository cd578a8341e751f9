"""Pipeline parallelism: groups of layers cut into stages, which work on microbatches in turn.

The ``layers`` axis of a group's parameters is cut over the mesh axis ``pipeline``, and the batch
into M microbatches. With P devices along the axis and V rounds there are P V stages of
``repeat / (P V)`` layers; stage ``v P + p`` lives on device p. All do the same at once: each device
runs one of its stages on the microbatch it holds and hands the result to its neighbour. Counting
the work that enters device 0 as k = 0, 1, ..., device p does number ``k = t - p`` in step t:

    microbatch (k // PV) P + k % P,  round (k % PV) // P,  idle if k < 0 or k >= M V

Microbatches thus come in sets of P that go around V times before the next set enters, so that what
leaves the last device is exactly what the first one needs next and nothing waits in between
(Megatron's interleaved schedule, arXiv 2104.04473, 2.2, as a loop of equal steps). The last
microbatch is done after M V + P - 1 steps, of which every device idles P - 1: see
:func:`bubble_fraction`. An idle device computes too, on padding that nothing counts.

    P = 2, V = 2, M = 4        t = 0   1   2   3   4   5   6   7   8
    device 0 (round:microbatch)  0:0 0:1 1:0 1:1 0:2 0:3 1:2 1:3  -
    device 1                      -  0:0 0:1 1:0 1:1 0:2 0:3 1:2 1:3

Outside the pipeline the batch is cut over the axis as well, and every device holds its own M / P
microbatches as one entry of each *set*. While a set enters, it turns by one device per step like a
carousel: device 0 takes the next microbatch off and, in its place, puts the one that just finished,
which so travels to the device of its rows. The result of set i ends up in the place of set i + 1.

The devices are one leading array axis, cut over ``pipeline``; ``jax.vmap`` over it makes each run
its stage, and what a stage computes is sharded over the other mesh axes as without a pipeline. The
backward pass is the transpose of the loop.

Shape suffixes: P devices of the pipeline, V rounds, n layers of a stage, S sets (one more than the
microbatches of a device), B batch, b rows of a microbatch, T tokens, D model width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.models.context import Context

AXIS = "pipeline"
MICROBATCHES_PER_STAGE = 4


def steps(stages: int, rounds: int, microbatches: int) -> int:
    """Steps of the schedule, in each of which every device computes one stage of a round."""
    return microbatches * rounds + stages - 1


def bubble_fraction(stages: int, rounds: int, microbatches: int) -> float:
    """The share of its steps that a device idles: ``(P - 1) / (M V + P - 1)``."""
    return (stages - 1) / steps(stages, rounds, microbatches)


def work_at(t, place, stages: int, rounds: int, microbatches: int):
    """(busy, microbatch, round) of the device at ``place`` in step ``t``; integers or arrays."""
    k, period = t - place, stages * rounds
    busy = (k >= 0) & (k < microbatches * rounds)
    return busy, k // period * stages + k % stages, k % period // stages


def microbatches(rows: int, sharding: Sharding) -> int:
    """Into how many microbatches a batch of ``rows`` rows is cut.

    Raises:
      ConfigError: the rows do not make microbatches of which every device has equally many rows.
    """
    stages = sharding.size(AXIS)
    ways = sharding.of_one_stage().ways("batch")
    fits = [n for n in range(stages, rows + 1, stages) if rows % (n * ways) == 0]
    wanted = sharding.microbatches
    if not wanted and fits:
        return max([n for n in fits if n <= MICROBATCHES_PER_STAGE * stages], default=fits[0])
    if wanted not in fits:
        raise ConfigError(
            f"a batch of {rows} rows cannot be cut into {wanted or stages} microbatches for a "
            f"pipeline of {stages} stages with rows spread over {ways} devices in each; "
            + (f"pipeline_microbatches that fit: {fits}" if fits else
               f"make the rows a multiple of {stages * ways}")
        )  # fmt: skip
    return wanted


def check(repeat: int, sharding: Sharding | None) -> None:
    """Raises ConfigError unless the largest group of layers can be pipelined on the mesh.

    Groups that do not divide (a few dense layers before the mixtures, say) run outside the
    pipeline, on all its devices with the batch cut over them. For the largest that would defeat the
    purpose, so there it is an error.

    Args:
      repeat: of the largest group.
    """
    if sharding is None or sharding.size(AXIS) == 1:
        return
    stages, rounds = sharding.size(AXIS), sharding.rounds
    if repeat % (stages * rounds):
        fits = [n for n in range(1, repeat // stages + 1) if repeat % (n * stages) == 0]
        sizes = [n for n in range(1, repeat + 1) if repeat % (n * rounds) == 0]
        raise ConfigError(
            f"the largest group of layers has repeat {repeat}, which does not divide into "
            f"pipeline {stages} x pipeline_rounds {rounds} stages; with pipeline {stages} fit "
            f"pipeline_rounds {fits or 'of no size'}, with pipeline_rounds {rounds} fit "
            f"pipeline {sizes or 'of no size'}"
        )


def is_pipelined(repeat: int, sharding: Sharding | None) -> bool:
    """Whether ``repeat`` layers are run as a pipeline: if they divide into its stages."""
    if sharding is None or sharding.size(AXIS) == 1:
        return False
    return repeat % (sharding.size(AXIS) * sharding.rounds) == 0


def run(stage: Callable, x_BTD, inputs: Any, repeat: int, ctx: Context, rows: Any):
    """Runs ``repeat`` layers as a pipeline, see the top of this file.

    Args:
      stage: (x_bTD, inputs of n layers, n, ctx, rows) -> (x_bTD, outputs of n layers).
      inputs, rows: as of ``trunk.run_layers``.

    Returns:
      (x_BTD, outputs of all layers, each the sum over the microbatches).
    """
    sharding = ctx.on_mesh
    P, V = sharding.size(AXIS), sharding.rounds
    M = microbatches(x_BTD.shape[0], sharding)
    work = jax.vmap(
        functools.partial(_work, stage, P, V, M, repeat // (P * V)),
        in_axes=(0, 0, 0, None),
        spmd_axis_name=AXIS,
    )
    inputs_PVn = jax.tree.map(functools.partial(by_stage, sharding), inputs)
    place_P = jnp.arange(P)
    sets_PS = _in_sets((x_BTD, replace(ctx, sharding=sharding.of_one_stage()), rows), M // P)

    def step(carry, t):
        sets_PS, held_P, sums_PVn = carry
        sets_PS, held_P = _exchange(sets_PS, held_P, t, P * V)
        held_P, out_PVn = work(inputs_PVn, place_P, held_P, t)
        held_P = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), held_P)  # to the neighbour
        return (sets_PS, held_P, jax.tree.map(jnp.add, sums_PVn, out_PVn)), None

    nothing_P = jax.tree.map(lambda a: a[:, -1], sets_PS)  # the last set is padding
    _, out_PVn = jax.eval_shape(work, inputs_PVn, place_P, nothing_P, 0)
    zero_PVn = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out_PVn)
    count = steps(P, V, M)
    (sets_PS, held_P, sums_PVn), _ = jax.lax.scan(
        step, (sets_PS, nothing_P, zero_PVn), jnp.arange(count)
    )
    (x_PSbTD, *_), _ = _exchange(sets_PS, held_P, count, P * V)
    x_BTD = jnp.moveaxis(x_PSbTD[:, 1:], 1, 2).reshape(x_BTD.shape)
    return ctx.constrain(x_BTD, "batch", "sequence", None), jax.tree.map(
        functools.partial(_by_layer, sharding), sums_PVn
    )


def _work(stage, P: int, V: int, M: int, n: int, inputs_Vn, place, held, t):
    """What one device does in step ``t``: (held, outputs by round, zero but in the round of now).

    Kept for the backward pass, if anything is rematerialised: what the device was handed. The stage
    is run again when its turn comes, and only then is kept what the policy says.
    """
    busy, _, turn = work_at(t, place, P, V, M)

    def compute(inputs_Vn, held):
        inputs_n = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, turn, 0, False), inputs_Vn
        )
        return stage(held[0], inputs_n, n, *held[1:])

    _, ctx, _ = held
    if ctx.execution.remat != "none":
        nothing = jax.checkpoint_policies.nothing_saveable
        compute = jax.checkpoint(compute, policy=nothing, prevent_cse=False)
    x_bTD, out_n = compute(inputs_Vn, held)
    now_V = (jnp.arange(V) == turn) & busy
    out_Vn = jax.tree.map(lambda a: jnp.where(now_V.reshape(V, *(1,) * a.ndim), a, 0), out_n)
    return (x_bTD, *held[1:]), out_Vn


# Checkpointed: all it needs backwards is the step, but jax would keep masks as large as the states.
@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _exchange(sets_PS, held_P, t, period: int):
    """Lets a microbatch on and the finished one off if a set enters in step ``t``, and turns it."""

    def carousel(sets_PS, held_P):
        i = t // period

        def leaf(set_PS, held_P):
            set_P = jax.lax.dynamic_index_in_dim(set_PS, i, 1, keepdims=False)
            first_P = (jnp.arange(held_P.shape[0]) == 0).reshape(-1, *(1,) * (held_P.ndim - 1))
            turned_P = jnp.roll(jnp.where(first_P, held_P, set_P), -1, axis=0)
            set_PS = jax.lax.dynamic_update_index_in_dim(set_PS, turned_P, i, 1)
            return set_PS, jnp.where(first_P, set_P, held_P)

        return _unzip(jax.tree.map(leaf, sets_PS, held_P), sets_PS)

    stages = jax.tree.leaves(held_P)[0].shape[0]
    if period == stages:
        return carousel(sets_PS, held_P)
    return jax.lax.cond(t % period < stages, carousel, lambda *a: a, sets_PS, held_P)


def _unzip(pairs, like):
    return jax.tree.transpose(jax.tree.structure(like), None, pairs)


def _in_sets(held, sets: int):
    """Rows cut into microbatches: (P, S, b, ...), the last set padding; no row leaves its device.

    Row ``(p b + i) sets + s`` of P b sets rows is row i of microbatch p of set s.
    """
    x_BTD, ctx, _ = held
    sharding, stages = ctx.sharding, ctx.sharding.size(AXIS)
    rows = x_BTD.shape[0] // (stages * sets)
    (batch,) = sharding.spec(("batch",), (rows,))
    padding = jax.tree.map(lambda _: 0, held)
    padding = (padding[0], padding[1].replace(tokens=ctx.tokens.nowhere()), padding[2])

    def leaf(a, fill):
        a = jnp.moveaxis(a.reshape(stages, rows, sets, *a.shape[1:]), 2, 1)
        a = _constrain(sharding, a, AXIS, None, batch)
        return jnp.pad(a, ((0, 0), (0, 1), *((0, 0),) * (a.ndim - 2)), constant_values=fill)

    return jax.tree.map(leaf, held, padding)


def by_stage(sharding: Sharding, a):
    """(layers, ...) as (P, V, n, ...). With several rounds the layers change place here.

    Of V P pieces in order, device s holds ``s V + u`` (u < V) in the parameters' own layout, and
    works on ``v P + s`` (v < V). The pieces move in V permutations of the devices: number r takes,
    with g = gcd(P, V), what each device has at ``u = r - r % g + (r + s // (P / g)) % g``.
    """
    P, V = sharding.size(AXIS), sharding.rounds
    a_PVn = a.reshape(P, V, a.shape[0] // (P * V), *a.shape[1:])
    a_PVn = _constrain(sharding, a_PVn, AXIS, None, None)
    if V == 1:
        return a_PVn
    g, s_P1, r_V = math.gcd(P, V), np.arange(P)[:, None], np.arange(V)
    u_PV = r_V - r_V % g + (r_V + s_P1 // (P // g)) % g
    v_PV, to_PV = np.divmod(s_P1 * V + u_PV, P)
    from_VP = np.argsort(to_PV, axis=0).T
    arrives_PV = np.argsort(v_PV[from_VP, r_V[:, None]].T, axis=1)  # in which permutation

    def local(a_1Vn):
        here = jax.lax.axis_index(AXIS)
        leaving_Vn = a_1Vn[0][jnp.asarray(u_PV)[here]]
        routes = [list(enumerate(to_P)) for to_P in to_PV.T.tolist()]
        moved = [jax.lax.ppermute(leaving_Vn[r], AXIS, route) for r, route in enumerate(routes)]
        return jnp.stack(moved)[jnp.asarray(arrives_PV)[here]][None]

    spec = PartitionSpec(AXIS)
    return jax.shard_map(
        local, mesh=sharding.mesh, axis_names={AXIS}, in_specs=spec, out_specs=spec
    )(a_PVn)


def _by_layer(sharding: Sharding, a_PVn):
    """The outputs of all stages in the order of the layers, the same on all devices."""
    a_PVn = _constrain(sharding, a_PVn, None, None, None)
    P, V, n = a_PVn.shape[:3]
    return jnp.swapaxes(a_PVn, 0, 1).reshape(P * V * n, *a_PVn.shape[3:])


def _constrain(sharding: Sharding, a, *leading):
    """The layout of the leading axes, by mesh axes; that of the others is left open."""
    spec = PartitionSpec(*leading, *(PartitionSpec.UNCONSTRAINED,) * (a.ndim - len(leading)))
    return jax.lax.with_sharding_constraint(a, NamedSharding(sharding.mesh, spec))
