"""The slot engine: ``step-jax generate``, evaluation and rollouts write with it.

A fixed number of slots; as soon as a text ends the next one takes its slot (continuous batching).
The device's half is ``slots.Decoding``, three pure functions; here is the host's loop around them.

Shape suffixes: B slots, U texts that are read, N texts that are placed, T padded text, L layers of
a stack, K experts of a token, M numbers of a name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import Sharding
from step_jax.inference import slots as device
from step_jax.inference.requests import MARKS, Completion, Request, StopReason, Text, outside
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.slots import Conditions, Decoding, Slots, Thoughts, Written
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Cache, Decoder

SMALLEST_BUCKET = 16


@dataclass
class Stats:
    """Of one run of the engine.

    Attributes:
      slots: of the engine.
      steps: tokens that every slot had the time to write.
      tokens: that were written.
      read_tokens: of texts that were read before they were gone on with.
      shared_tokens: that need not be read, being those of a text that was.
      turns: times that the host looked at what was written.
      reading_seconds, writing_seconds: wall time of both, as the host saw it.
    """

    slots: int
    steps: int = 0
    tokens: int = 0
    read_tokens: int = 0
    shared_tokens: int = 0
    turns: int = 0
    reading_seconds: float = 0.0
    writing_seconds: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the slots' time in which they wrote."""
        return self.tokens / max(1, self.steps * self.slots)

    @property
    def seconds(self) -> float:
        return self.reading_seconds + self.writing_seconds


@dataclass(frozen=True)
class _Read:
    """Texts that were read: the cache with them, on the device, and the row of each."""

    cache: Cache
    routing_LUTK: tuple[np.ndarray, ...]
    rows: dict[tuple[int, ...], int]


class Engine:
    """Writes what requests ask for, in ``slots`` slots.

    What a text becomes depends on its request, the seed and the parameters alone, up to rounding of
    the logits: not on other requests, their order, ``slots``, ``chunk`` or the mesh.

    Args:
      decoder: the model; ``run`` gets its parameters.
      sampling: how tokens are chosen; its ``max_new_tokens`` is not read, requests have their own.
      slots: texts under way at a time; on a mesh a multiple of what its batch is cut into.
      max_length: of a text, its answer included: what a slot's cache has room for.
      seed: of the draws; None for that of ``sampling``.
      stop_ids: tokens that end every text.
      sharding: mesh and rules, or None on one device; every process passes the same requests.
      cache_dtype: None for the compute dtype.
      chunk: the most tokens that a slot writes between two looks of the host.
      keep_routing: record the decisions of mixtures of experts.

    Raises:
      ConfigError: no slot, room or chunk; slots that the mesh does not divide; too many stop ids.
      DataError: a stop id outside the vocabulary.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampling: SamplingConfig,
        *,
        slots: int,
        max_length: int,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        execution: Execution,
        sharding: Sharding | None = None,
        cache_dtype=None,
        chunk: int = 32,
        keep_routing: bool = False,
    ):
        self._ways = 1 if sharding is None else sharding.ways("batch")
        for name, value in (("slots", slots), ("max_length", max_length), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if slots % self._ways:
            raise ConfigError(f"{slots} slots are no multiple of the mesh's {self._ways} batches")
        if (bad := outside(stop_ids, decoder.vocab)) is not None:
            raise DataError(
                f"the stop id {bad} is outside the vocabulary of {decoder.vocab} tokens"
            )
        self.slots, self.max_length, self.chunk = slots, max_length, chunk
        self.stop_ids = tuple(sorted(set(map(int, stop_ids))))
        self.vocab = decoder.vocab
        self.stats = Stats(slots)
        # what is compiled depends on neither of the two
        self._sampling = replace(sampling, seed=0, max_new_tokens=1)
        self._key = jax.random.key(sampling.seed if seed is None else seed)
        self.programs = device.programs(
            Decoding.of(decoder, max_length, execution, sharding, cache_dtype, keep_routing)
        )

    def run(
        self,
        params,
        requests: Iterable[Request],
        *,
        version: int = 0,
        token_budget: int | None = None,
        on_tokens: Callable[[Request, list[int]], None] | None = None,
    ) -> Iterator[Completion]:
        """Completions, in the order in which texts end.

        ``requests`` are taken one by one as slots become free. Of those that follow each other and
        have equal texts (the samples of a group) the text is read once. Nothing is kept from run to
        run but compiled programs; ``stats`` are of the latest.

        Args:
          params: of the decoder, any float dtype, laid out on the engine's mesh if there is one.
          version: of these parameters, for ``Completion.versions``.
          token_budget: after so many new tokens, at most one a slot more, nothing is begun or
            written any more. Texts under way come out ``unfinished``: ``Completion.carried`` goes
            on with them. Requests that were not begun are left in ``requests``, if an iterator.
          on_tokens: called with every text's new tokens as they come, at most ``chunk`` at a time.

        Raises:
          DataError: a request that cannot be written, see ``Request.check``.
        """
        return _Run(self, params, version, token_budget, on_tokens).completions(iter(requests))


class _Run:
    """One call of :meth:`Engine.run`."""

    def __init__(self, engine: Engine, params, version: int, token_budget, on_tokens):
        self.engine, self.version, self.on_tokens = engine, version, on_tokens
        self.budget = token_budget
        self.programs = engine.programs
        self.stats = engine.stats = Stats(engine.slots)
        self.params = self.programs.cast(params)
        self.slots: Slots = self.programs.empty(engine.slots, MARKS)
        self.texts: dict[int, Text] = {}
        self.reads: list[_Read] = []

    def completions(self, waiting: Iterator[Request]) -> Iterator[Completion]:
        engine, more = self.engine, True
        while True:
            if self.budget is not None and self.stats.tokens >= self.budget:
                for slot in sorted(self.texts):
                    yield self.texts[slot].completion("unfinished", self.version)
                return
            free = [slot for slot in range(engine.slots) if slot not in self.texts]
            taken: list[Text] = []
            while more and len(taken) < len(free):
                request = next(waiting, None)
                if more := request is not None:
                    text = self._checked(request)
                    if len(text.ids) < text.limit(engine.max_length):
                        taken.append(text)
                    else:
                        yield text.completion(text.reason(), self.version)
            if taken:
                self._admit(dict(zip(free, taken, strict=False)))
            if not self.texts:
                return
            yield from self._advance(more)

    def _checked(self, request: Request) -> Text:
        engine = self.engine
        request.check(engine.vocab, engine.max_length)
        if len({*engine.stop_ids, *request.stop_ids}) > MARKS:
            raise DataError(f"{request.label} ends at more than {MARKS} stop ids with the engine's")
        return Text.of(request)

    # --- texts come ----------------------------------------------------------------------------

    def _admit(self, new: dict[int, Text]) -> None:
        """Reads the texts, each but for its last token, and puts them into their slots."""
        start = time.perf_counter()
        self.texts |= new
        parts = {slot: text.ids[:-1] for slot, text in new.items()}
        known = {ids for read in self.reads for ids in read.rows}
        unread = dict.fromkeys(ids for ids in parts.values() if ids not in known)
        sizes = {ids: min(bucket(len(ids)), self.engine.max_length) for ids in unread}
        for size in sorted(set(sizes.values())):
            self.reads.append(self._read([ids for ids in unread if sizes[ids] == size], size))
        for read in self.reads:
            here = {slot: read.rows[ids] for slot, ids in parts.items() if ids in read.rows}
            if here:
                self._place(read, here)
        read_tokens = sum(map(len, unread))
        self.stats.read_tokens += read_tokens
        self.stats.shared_tokens += sum(map(len, parts.values())) - read_tokens
        # the next request may be of the same group
        last = parts[max(new)]
        self.reads = [read for read in self.reads if last in read.rows]
        self.stats.reading_seconds += time.perf_counter() - start

    def _read(self, parts: list[tuple[int, ...]], size: int) -> _Read:
        texts_UT = np.zeros((_padded(len(parts), self.engine._ways), size), np.int32)
        lengths_U = np.zeros(len(texts_UT), np.int32)
        for row, ids in enumerate(parts):
            texts_UT[row, : len(ids)], lengths_U[row] = ids, len(ids)
        cache, routing = self.programs.read(self.params, texts_UT, lengths_U, size)
        return _Read(cache, jax.device_get(routing), {ids: row for row, ids in enumerate(parts)})

    def _place(self, read: _Read, rows: dict[int, int]) -> None:
        """Puts texts that were read into slots; ``rows`` are those of ``read``, by slot."""
        engine, N = self.engine, _padded(len(rows))
        source_N, slot_N = np.zeros(N, np.int32), np.full(N, engine.slots, np.int32)
        slot_N[: len(rows)], source_N[: len(rows)] = list(rows), list(rows.values())
        texts = [self.texts[slot] for slot in rows]
        names = [text.request.name for text in texts]
        names_NM = np.zeros((N, max(map(len, names))), np.uint32)
        counts_N = np.zeros(N, np.int32)
        for row, name in enumerate(names):
            names_NM[row, : len(name)], counts_N[row] = name, len(name)
        self.slots = self.programs.place(
            self.slots, read.cache, source_N, slot_N, self._conditions(texts, N),
            engine._key, names_NM, counts_N,
        )  # fmt: skip
        for text, row in zip(texts, rows.values(), strict=True):
            if read.routing_LUTK:
                length = len(text.ids) - 1
                text.routing.append(tuple(a[:, row, :length] for a in read.routing_LUTK))

    def _conditions(self, texts: list[Text], count: int) -> Conditions:
        """Those of the texts, and of as many without meaning as make ``count``."""
        number = {name: np.zeros(count, np.int32) for name in ("token", "limit", "start", "rest")}
        number |= {name: np.zeros(count, np.int32) for name in ("least", "most")}
        marks = {name: np.full((count, MARKS), -1, np.int32)
                 for name in ("stop", "close", "forced", "recent")}  # fmt: skip
        open_N = np.zeros(count, bool)
        for row, text in enumerate(texts):
            r = text.request
            number["token"][row] = text.ids[-1]
            number["limit"][row] = text.limit(self.engine.max_length)
            stop = sorted({*self.engine.stop_ids, *r.stop_ids})
            marks["stop"][row, : len(stop)] = stop
            if r.thought is None:
                continue
            t, recent = r.thought, text.tokens[-MARKS:]
            open_N[row] = t.length(text.tokens) is None
            for name, value in (("start", len(r.prompt)), ("rest", r.max_new_tokens),
                                ("least", t.least), ("most", t.most)):  # fmt: skip
                number[name][row] = value
            marks["close"][row, MARKS - len(t.close) :] = t.close
            marks["forced"][row, : len(t.ending)] = t.ending
            marks["recent"][row, MARKS - len(recent) :] = recent
        thoughts = Thoughts(
            open_N, *(number[name] for name in ("start", "least", "most", "rest")),
            *(marks[name] for name in ("close", "forced", "recent")),
        )  # fmt: skip
        return Conditions(number["token"], number["limit"], marks["stop"], thoughts)

    # --- texts go on ---------------------------------------------------------------------------

    def _advance(self, more: bool) -> Iterator[Completion]:
        """Writes a chunk, and takes the texts that ended out of their slots."""
        start = time.perf_counter()
        engine, slots = self.engine, self.engine.slots
        steps, leave = engine.chunk, slots
        if self.budget is not None:
            steps = min(steps, -(-(self.budget - self.stats.tokens) // len(self.texts)))
        if more:  # requests wait: a look at few slots costs more than two of them being idle
            leave = max(1, min(2, slots // 8), slots // 16)
        thinking = any(text.request.thought is not None for text in self.texts.values())
        self.slots, written = self.programs.advance(
            self.params, self.slots, np.int32(steps), np.int32(leave),
            sampling=engine._sampling, columns=bucket(engine.chunk), thinking=thinking,
        )  # fmt: skip
        # ``done`` is on every device, as what is written is
        written, done_B = jax.device_get((written, self.slots.done_B))
        self.stats.turns += 1
        self.stats.steps += int(written.lengths_B.max())
        self.stats.tokens += int(written.lengths_B.sum())
        new = {slot: self._collect(text, slot, written) for slot, text in self.texts.items()}
        self.stats.writing_seconds += time.perf_counter() - start
        for slot, tokens in new.items():
            if self.on_tokens is not None and tokens:
                self.on_tokens(self.texts[slot].request, tokens)
        for slot in [slot for slot in self.texts if done_B[slot]]:
            text = self.texts.pop(slot)
            reason: StopReason = "stop" if written.stopped_B[slot] else text.reason()
            yield text.completion(reason, self.version)

    def _collect(self, text: Text, slot: int, written: Written) -> list[int]:
        n = written.lengths_B[slot]
        tokens = written.tokens_BN[slot, :n].tolist()
        text.tokens += tokens
        text.logprobs.append(np.array(written.logprobs_BN[slot, :n]))
        if written.routing_LBNK:
            text.routing.append(tuple(np.array(a[:, slot, :n]) for a in written.routing_LBNK))
        return tokens


def bucket(n: int, least: int = SMALLEST_BUCKET) -> int:
    """The power of two, at least 16, that ``n`` is padded to: few shapes, few compilations."""
    return max(least, 1 << max(0, n - 1).bit_length())


def _padded(rows: int, ways: int = 1) -> int:
    """The power of two that as many rows are padded to, rounded up to a multiple of ``ways``."""
    return -(-bucket(rows, 1) // ways) * ways


def bytes_of_a_slot(decoder: Decoder, length: int, dtype, sharding: Sharding | None = None) -> int:
    """Bytes that a text of ``length`` tokens has in the cache, all layers together.

    It is the attention kinds that say what they keep of a token: keys and values of every key head
    (MHA, GQA), of the one that MFA has, its key alone with key reuse, a latent and a rotated key
    (MLA); a windowed layer keeps one window.

    Args:
      sharding: count what one device has; slots are spread over those that the batch is cut into.
    """
    ways = 1 if sharding is None else sharding.ways("batch")
    shapes = jax.eval_shape(lambda: decoder.init_cache(ways, length, dtype)).layers
    leaves = jax.tree.leaves(shapes)
    if sharding is None:
        return sum(a.size * a.dtype.itemsize for a in leaves)
    parts = [sharding.named(device.axes(a), a.shape).shard_shape(a.shape) for a in leaves]
    sizes = [int(np.prod(part)) for part in parts]
    return sum(size * a.dtype.itemsize for size, a in zip(sizes, leaves, strict=True))


def slots_in(
    memory: int, decoder: Decoder, length: int, dtype, sharding: Sharding | None = None
) -> int:
    """How many slots for texts of ``length`` tokens fit into ``memory`` bytes of every device."""
    ways = 1 if sharding is None else sharding.ways("batch")
    return memory // bytes_of_a_slot(decoder, length, dtype, sharding) * ways
