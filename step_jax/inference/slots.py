"""The engine on the device: slots of a cache that texts are put into, go on in, and leave.

Three pure functions. ``read`` runs a model over texts (of a group of equal prompts one), ``place``
copies what it left into free slots, ``advance`` writes tokens in a ``while_loop``. The last token
of a text is not read: it is the first that ``advance`` is fed, so every draw is made in one place.

Shape suffixes: B slots, U texts that are read, N texts that are placed or new tokens of a slot,
T padded text, S tokens of a cache, V vocabulary, D model width, L layers of a stack, K experts of a
token, M numbers of a name, X marks (``requests.MARKS``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.inference.sampling import SamplingConfig, draw_keys, row_keys, sample
from step_jax.models.context import Context, Execution
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Cache, Decoder
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import routing_of


@struct.dataclass
class Thoughts:
    """The ``requests.Thought`` of every slot's text.

    Attributes:
      open_B: bool, whether the text is in a thought.
      start_B: int32, length of the text where the answer, and so the thought, begins.
      least_B, most_B: int32, see ``Thought``.
      rest_B: int32, the most that is written after the thought.
      close_BX: int32, from the right; -1 where there is none.
      forced_BX: int32, from the left; -1 where there is none.
      recent_BX: int32, the newest tokens of the answer; -1 before its first.
    """

    open_B: Any
    start_B: Any
    least_B: Any
    most_B: Any
    rest_B: Any
    close_BX: Any
    forced_BX: Any
    recent_BX: Any


@struct.dataclass
class Conditions:
    """Per slot: what a text goes on from and under which conditions.

    Attributes:
      token_B: int32, the newest token, not in the cache yet.
      limit_B: int32, length of the text, prompt included, at which it ends.
      stop_BX: int32 tokens that end it; -1 where there is none.
      thoughts: see :class:`Thoughts`.
    """

    token_B: Any
    limit_B: Any
    stop_BX: Any
    thoughts: Thoughts


@struct.dataclass
class Slots:
    """Texts under way. A slot without one is done."""

    cache: Cache
    keys_B: Any
    conditions: Conditions
    done_B: Any
    stopped_B: Any


@struct.dataclass
class Written:
    """New tokens of a batch, on the device.

    Attributes:
      tokens_BN: int32; the stop token is the last one of its row, 0 follows.
      logprobs_BN: float32, see ``sampling.sample``; 0 where nothing is written, or not chosen.
      lengths_B: int32, how many of the N a row wrote.
      stopped_B: whether the row has ended with a stop token.
      routing_LBNK: decisions about the tokens that were fed (one before those that were written),
        the leaves of ``trunk.routing_of``; empty unless they are kept.
    """

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array
    routing_LBNK: tuple[jax.Array, ...] = ()


class Programs(NamedTuple):
    """The compiled halves of :class:`Decoding`, see its methods of the same names."""

    cast: Any
    empty: Any
    read: Any
    place: Any
    advance: Any


@dataclass(frozen=True)
class Decoding:
    """Everything static about decoding.

    length: slots of tokens of a text that is not windowed: the longest text.
    """

    decoder: Decoder
    length: int
    execution: Execution
    sharding: Sharding | None
    cache_dtype: str
    keep_routing: bool = False

    @classmethod
    def of(cls, decoder, length, execution, sharding, cache_dtype, keep_routing=False) -> Decoding:
        if sharding is not None:
            # one token has no sequence to split: decoding repeats it along the context axis
            sharding = replace(sharding, rules=(*sharding.rules, ("sequence", ())))
        dtype = jnp.dtype(execution.dtype if cache_dtype is None else cache_dtype).name
        return cls(decoder, length, execution, sharding, dtype, keep_routing)

    # --- pure ----------------------------------------------------------------------------------

    def cast(self, params):
        """Parameters in the compute dtype."""
        return spec_lib.cast(params, self.execution.dtype, self.decoder.specs())

    def empty(self, slots: int, marks: int) -> Slots:
        """Slots without a text."""
        zero_B = jnp.zeros(slots, jnp.int32)
        none_BX = jnp.full((slots, marks), -1, jnp.int32)
        thoughts = Thoughts(zero_B > 0, *(zero_B,) * 4, *(none_BX,) * 3)
        return Slots(
            self._cache(slots, self.length),
            jax.random.key_data(jax.vmap(jax.random.key)(zero_B)),
            Conditions(zero_B, zero_B, none_BX, thoughts),
            zero_B == 0,
            zero_B > 0,
        )

    def read(self, params, texts_UT, lengths_U, length: int):
        """(a cache of ``length`` tokens a row with the texts, routing_LUTK as in ``Written``)."""
        index_1T = jnp.arange(texts_UT.shape[1], dtype=jnp.int32)[None]
        order_UT = jnp.where(index_1T < lengths_U[:, None], index_1T, -1)
        cache = self._cache(texts_UT.shape[0], length)
        ctx = self._context(order_UT, fresh=True)
        _, cache, stats = self.decoder.hidden(params, texts_UT, ctx, cache)
        return self._laid_out(cache), self._routing(stats)

    def place(
        self, slots: Slots, read: Cache, source_N, slot_N, conditions: Conditions,
        key, names_NM, counts_N
    ) -> Slots:  # fmt: skip
        """Puts texts into slots.

        Args:
          read: what :meth:`read` left of the texts.
          source_N: int32, the row of ``read`` that each text is in.
          slot_N: int32, the slot that it goes to; one that is not there for none.
          conditions: of the N texts.
          key, names_NM, counts_N: of the draws, see ``sampling.row_keys``.
        """

        def copy(all_LBS, read_LUS):
            # a ring that is not full yet holds position p in slot p, whatever its size
            some_LNS = read_LUS[:, source_N]
            if self.sharding is not None:
                some_LNS = self.sharding.constrain(some_LNS, *(None,) * some_LNS.ndim)
            return all_LBS.at[:, slot_N, : some_LNS.shape[2]].set(some_LNS, mode="drop")

        def put(all_B, some_N):
            return all_B.at[slot_N].set(some_N, mode="drop")

        layers = jax.tree.map(copy, slots.cache.layers, read.layers)
        lengths_B = put(slots.cache.lengths_B, read.lengths_B[source_N])
        keys_N = jax.random.key_data(row_keys(key, names_NM, counts_N))
        return Slots(
            self._laid_out(Cache(layers, lengths_B)),
            put(slots.keys_B, keys_N),
            jax.tree.map(put, slots.conditions, conditions),
            put(slots.done_B, False),
            put(slots.stopped_B, False),
        )

    def advance(
        self, params, slots: Slots, steps, leave, sampling: SamplingConfig, columns: int,
        thinking: bool
    ) -> tuple[Slots, Written]:  # fmt: skip
        """Writes up to ``steps`` tokens in every slot that has a text.

        Args:
          steps: int32, at most ``columns``.
          leave: int32; ends sooner where so many slots are done.
          sampling: how; its seed and number of tokens are not read.
          columns: N of what is written.
          thinking: whether any text has a thought.

        Returns:
          (slots, Written).
        """
        B = slots.done_B.shape[0]

        def unfinished(carry):
            step, slots, _ = carry
            return (step < steps) & (jnp.sum(slots.done_B) < leave)

        def write(carry):
            step, slots, written = carry
            alive_B = ~slots.done_B
            order_B1 = jnp.where(alive_B, slots.cache.lengths_B, -1)[:, None]
            x_B1D, cache, stats = self.decoder.hidden(
                params, slots.conditions.token_B[:, None], self._context(order_B1), slots.cache
            )
            slots = replace(slots, cache=self._laid_out(cache))
            slots, token_B, logprob_B = self._draw(params, slots, x_B1D, sampling, thinking)
            kept = zip(written.routing_LBNK, self._routing(stats), strict=True)
            written = Written(
                written.tokens_BN.at[:, step].set(token_B),
                written.logprobs_BN.at[:, step].set(logprob_B),
                written.lengths_B + alive_B,
                slots.stopped_B,
                tuple(all_.at[:, :, step].set(new[:, :, 0]) for all_, new in kept),
            )
            return step + 1, slots, written

        empty = Written(
            jnp.zeros((B, columns), jnp.int32),
            jnp.zeros((B, columns), jnp.float32),
            jnp.zeros(B, jnp.int32),
            slots.stopped_B,
            tuple(jnp.zeros((s[0], B, columns, s[1]), jnp.int32) for s in self._routers()),
        )
        carry = jnp.int32(0), slots, empty
        _, slots, written = jax.lax.while_loop(unfinished, write, carry)
        return slots, written

    def _draw(self, params, slots: Slots, x_B1D, sampling: SamplingConfig, thinking: bool):
        """(slots, the tokens after their cached texts, log-probabilities); 0 in slots without."""
        context = self._context(None)
        logits_BV = self.decoder.logits(params, x_B1D, context)[:, 0]
        # ranks are of the whole vocabulary
        logits_BV = context.constrain(logits_BV, "batch", None)
        c, length_B, alive_B = slots.conditions, slots.cache.lengths_B, ~slots.done_B
        keys_B = draw_keys(jax.random.wrap_key_data(slots.keys_B), length_B)
        banned_BX = _banned(c, length_B, logits_BV.shape[1]) if thinking else None
        token_B, logprob_B = sample(logits_BV, keys_B, sampling, banned_BX)
        forced_B = alive_B & False
        if thinking:
            c, token_B, forced_B = _thought(c, length_B, token_B)
        token_B = jnp.where(alive_B, token_B, 0)
        logprob_B = jnp.where(alive_B & ~forced_B, logprob_B, 0.0)
        marked_B = jnp.any(token_B[:, None] == c.stop_BX, axis=-1)
        stopped_B = alive_B & ~forced_B & marked_B
        slots = replace(
            slots,
            conditions=replace(c, token_B=token_B),
            done_B=slots.done_B | stopped_B | (length_B + 1 >= c.limit_B),
            stopped_B=slots.stopped_B | stopped_B,
        )
        return slots, token_B, logprob_B

    def _context(self, order_BT, fresh: bool = False) -> Context:
        return Context(
            Tokens(order_BT),
            fresh=fresh,
            record_routing=self.keep_routing,
            sharding=self.sharding,
            execution=self.execution,
        )

    def _cache(self, rows: int, length: int) -> Cache:
        return self._laid_out(self.decoder.init_cache(rows, length, self.cache_dtype))

    def _laid_out(self, cache: Cache) -> Cache:
        """Rows of the cache lie with the batch, key/value heads (if any) with the heads."""
        sharding = self.sharding
        if sharding is None:
            return cache

        def layout(a):
            return sharding.constrain(a, *axes(a))

        return replace(cache, layers=jax.tree.map(layout, cache.layers))

    def _routing(self, stats) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(routing_of(stats))) if self.keep_routing else ()

    def _routers(self) -> list[tuple[int, int]]:
        """(layers, experts of a token) of every stack with routers whose decisions are kept."""
        if not self.keep_routing:
            return []
        stacks = ((s.repeat, s.block.mlp) for s in self.decoder.trunk.walk())
        return [(repeat, mlp.router.top_k) for repeat, mlp in stacks if isinstance(mlp, MoE)]

    # --- compiled ------------------------------------------------------------------------------

    def programs(self, compiler_options=None) -> Programs:
        """The functions above under ``jit``; what leaves them lies where it enters them.

        Caches lie with the batch; conditions and what is written are whole on every device, so that
        every process can read them.
        """
        jit = functools.partial(jax.jit, compiler_options=compiler_options)
        slots = read = written = None
        if self.sharding is not None:
            slots, whole = self.layout(), self.sharding.replicated()
            read, written = (slots.cache, whole), (slots, whole)
        return Programs(
            jit(self.cast),
            jit(self.empty, static_argnums=(0, 1), out_shardings=slots),
            jit(self.read, static_argnums=3, out_shardings=read),
            jit(self.place, donate_argnums=0, out_shardings=slots),
            jit(
                self.advance,
                static_argnames=("sampling", "columns", "thinking"),
                donate_argnums=1,
                out_shardings=written,
            ),
        )

    def layout(self) -> Slots:
        """Where slots lie on the mesh, as a tree of NamedSharding."""
        sharding = self.sharding
        assert sharding is not None
        like = jax.eval_shape(lambda: self.empty(sharding.ways("batch"), 1))
        slots = jax.tree.map(lambda _: sharding.replicated(), like)
        layers = jax.tree.map(lambda a: sharding.named(axes(a), a.shape), like.cache.layers)
        return replace(slots, cache=replace(slots.cache, layers=layers))


def axes(a) -> tuple[str | None, ...]:
    """The logical axes of an array (L, B, S, ...) of a cache."""
    return None, "batch", None, *(("kv_heads", None) if a.ndim == 5 else (None,) * (a.ndim - 3))


def _banned(c: Conditions, length_B, vocab: int):
    """int32 (B, X + 1): what would end a thought that has not its least length; V for nothing."""
    t = c.thoughts
    held_B1 = (t.open_B & (length_B - t.start_B < t.least_B))[:, None]
    before_BX = t.close_BX[:, :-1]
    # the newest token is in ``recent`` already
    closing_B = jnp.all((before_BX < 0) | (before_BX == t.recent_BX[:, 1:]), axis=1)
    last_B1 = jnp.where(closing_B, t.close_BX[:, -1], -1)[:, None]
    marks_BX = jnp.concatenate([c.stop_BX, last_B1], axis=1)
    return jnp.where(held_B1 & (marks_BX >= 0), marks_BX, vocab)


def _thought(c: Conditions, length_B, token_B):
    """(conditions, tokens, which of them are forced) after a draw."""
    t = c.thoughts
    over_B = length_B - t.start_B - t.most_B  # tokens that are forced already
    forced_B = t.open_B & (over_B >= 0)
    place_B1 = jnp.clip(over_B, 0, t.forced_BX.shape[1] - 1)[:, None]
    forced_token_B = jnp.take_along_axis(t.forced_BX, place_B1, axis=1)[:, 0]
    token_B = jnp.where(forced_B, forced_token_B, token_B)
    recent_BX = jnp.concatenate([t.recent_BX[:, 1:], token_B[:, None]], axis=1)
    by_itself_B = jnp.all((t.close_BX < 0) | (t.close_BX == recent_BX), axis=1)
    last_B = over_B + 1 == jnp.sum(t.forced_BX >= 0, axis=1)
    closed_B = t.open_B & jnp.where(forced_B, last_B, by_itself_B)
    return (
        replace(
            c,
            limit_B=jnp.where(closed_B, jnp.minimum(c.limit_B, length_B + 1 + t.rest_B), c.limit_B),
            thoughts=replace(t, open_B=t.open_B & ~closed_B, recent_BX=recent_BX),
        ),
        token_B,
        forced_B,
    )


#: One set of compiled programs for all engines that decode alike.
programs = functools.cache(Decoding.programs)
