"""The kernels that a decoder is computed with, as cases to check before they are trusted."""

from __future__ import annotations

from jax import ShapeDtypeStruct
from jax import numpy as jnp

from pallas_kernels.decode_call import DecodeCall
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.layers.attention import AttentionKind as Kind
from step_jax.models.layers.moe import MoE
from step_jax.models.layers.positions import Rope, alibi
from step_jax.models.text.decoder import Decoder
from step_jax.ops import attention, cross_entropy, decode_attention, grouped_matmul, selfcheck

#: Tokens of a checked row: two blocks and a part of any kernel here, and little memory beside it.
_LONG, _SHORT, _PAST_WINDOW, _LONGEST = 2500, 769, 389, 8192
#: Slots of a checked cache; groups of a grouped matmul; words of a vocabulary that is cut.
_SLOTS, _GROUPS, _WORDS = 1400, 8, 4096


def kernels_of(
    model: Decoder,
    execution: Execution,
    tokens: int,
    sharding: Sharding,
    *,
    writes: bool = True,
    left_to_xla: bool = False,
) -> list[selfcheck.Case]:
    """Each kernel that ``execution`` means for rows of ``tokens``, at the widths of one device.

    None where everything is left to XLA. Lengths are those at which kernels go wrong: two of them,
    neither a multiple of a block, the longer one past the window.

    Args:
      writes: text is written as well, so that the kernels of decoding count.
      left_to_xla: implementations that are no kernels count as well, but for decoding.

    Raises:
      ConfigError: an implementation that was named cannot be had on these devices.
    """
    cases: list[selfcheck.Case] = []
    for block in (stack.block for stack in model.trunk.walk()):
        cases += _attention(block.attention, execution, tokens, sharding, left_to_xla)
        if writes:
            cases += _decode(block.attention, execution, tokens, sharding)
        if isinstance(block.mlp, MoE):
            cases += _experts(model.width, block.mlp, execution, tokens, sharding, left_to_xla)
    cases += _loss(model, execution, sharding, left_to_xla)
    return list(dict.fromkeys(cases))  # layers are alike


def checked_lengths(tokens: int, window: int | None) -> list[int]:
    """Of the rows that attention is checked on, for runs on rows of ``tokens``."""
    long = max(_LONG, min((window or 0) + _PAST_WINDOW, _LONGEST))
    return sorted({min(tokens, long), max(1, min(_SHORT, 2 * tokens // 3))})


def attention_problem(
    kind: Kind, execution: Execution, tokens: int, sharding: Sharding
) -> attention.Problem:
    """What decides the implementation of a layer's attention in training."""
    width, value_width = kind.score_and_value_widths()
    return attention.Problem(
        width,
        value_width,
        queries=tokens,
        keys=tokens,
        dtype=execution.dtype,
        alibi=alibi(kind.position) is not None,
        in_order=sharding.size("context") == 1,
    )


def _heads(kind: Kind, sharding: Sharding) -> tuple[int, int]:
    """Query and key heads of one device."""
    if sharding.ulysses:
        sharding = sharding.of_whole_heads()
    ways = sharding.ways("heads")
    return kind.heads // ways, kind.kv // ways if kind.kv % ways == 0 else 1


def _attention(kind: Kind, execution: Execution, tokens: int, sharding: Sharding, every: bool):
    problem = attention_problem(kind, execution, tokens, sharding)
    name = attention.resolve(execution.attention, problem, sharding.mesh.devices.flat[0])
    if problem.alibi or not (every or attention.IMPLEMENTATIONS[name].kernel):
        return
    heads, kv_heads = _heads(kind, sharding)
    for length in checked_lengths(tokens, kind.window):
        yield selfcheck.Attention(
            name,
            heads,
            kv_heads,
            problem.width,
            problem.value_width,
            length,
            kind.window,
            execution.dtype,
            1 if sharding.ulysses else sharding.size("context"),
        )


def _decode(kind: Kind, execution: Execution, tokens: int, sharding: Sharding):
    width, entries = kind.score_and_value_widths()[0], kind.cache_entries()
    if any(entry[-1] != width for entry in entries):
        return  # the cache is not made of keys: its layers read it by XLA
    heads, kv_heads = _heads(kind, sharding)
    slots, reuse = min(tokens, _SLOTS), len(entries) == 1
    if reuse and not isinstance(kind.position, Rope):
        return  # rare: keys that are not rotated and are their own values

    def array(*shape, dtype=execution.dtype):
        return ShapeDtypeStruct(shape, jnp.dtype(dtype))

    cache = array(1, 1, slots, kv_heads, width)
    call = DecodeCall(
        array(1, 1, heads, width),
        cache,
        None if reuse else cache,
        array(1, 1, dtype="int32"),
        array(1, dtype="int32"),
        scale=1.0,
        window=kind.window,
        frequency_F=array(width // 2, dtype="float32") if reuse else None,
        layer=array(dtype="int32"),
    )
    problem = decode_attention.Problem(call, alibi(kind.position) is not None)
    device = sharding.mesh.devices.flat[0]
    name = decode_attention.in_place(execution.attention, problem, device)
    if name is not None and decode_attention.IMPLEMENTATIONS[name].kernel:
        yield selfcheck.Decode(
            name, heads, kv_heads, width, slots, kind.window, reuse, execution.dtype
        )


def expert_problems(
    width: int, mlp: MoE, execution: Execution, tokens: int, sharding: Sharding
) -> list[grouped_matmul.Problem]:
    """What decides the implementation of the experts' products."""
    problems = []
    for experts in mlp.experts:
        rows = tokens * mlp.router.top_k  # at least
        hidden = experts.hidden // sharding.ways("mlp")
        for widths in ((width, hidden), (hidden, width)):
            problems.append(
                grouped_matmul.Problem.of(rows, experts.count, *widths, execution.dtype)
            )
    return problems


def _experts(
    width: int, mlp: MoE, execution: Execution, tokens: int, sharding: Sharding, every: bool
):
    for problem in expert_problems(width, mlp, execution, tokens, sharding):
        device = sharding.mesh.devices.flat[0]
        name = grouped_matmul.resolve(execution.grouped_matmul, problem, device)
        if every or grouped_matmul.IMPLEMENTATIONS[name].kernel:
            E, D, F = problem.w_EDF.shape
            groups = min(_GROUPS, max(1, E // sharding.ways("experts")))
            yield selfcheck.GroupedMatmul(name, groups, D, F, execution.dtype)


def _loss(model: Decoder, execution: Execution, sharding: Sharding, every: bool):
    problem, device = cross_entropy.Problem.of(sharding), sharding.mesh.devices.flat[0]
    name = cross_entropy.resolve(execution.loss, problem, device)
    if every or cross_entropy.IMPLEMENTATIONS[name].kernel:
        words = model.vocab or _WORDS
        if words > _WORDS:  # a block or two, and the same last one
            words = _WORDS // 2 + words % (_WORDS // 4)
        yield selfcheck.CrossEntropy(name, model.width, words, dtype=execution.dtype)
