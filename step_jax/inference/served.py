"""The engine's interface over a server that others run: vLLM, SGLang, or who speaks the same.

Token ids go in, token ids and log-probabilities come out of ``POST /v1/completions``, streamed. A
pod that serves with such an engine rolls out with it. What its log-probabilities are is the
server's to say: importance correction belongs on, and the gap to the trainer's into the log.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError
from step_jax.inference.engine import Stats
from step_jax.inference.requests import Completion, Request, StopReason, Text
from step_jax.inference.sampling import SamplingConfig


class _Lost(DataError):
    """A server that does not answer, or stopped in the middle."""


@dataclass
class Served:
    """Writes what requests ask for on a server; ``run`` is that of ``engine.Engine``.

    A draw's seed is made of ``seed``, the request's name and the place, but servers draw as they
    like: the same text in other company is theirs to promise.

    ``logprobs`` are those that ``sampling.sample`` defines if the server gives those of
    ``softmax(logits / temperature)`` over the whole vocabulary. Without filters (top-k, top-p,
    min-p) vLLM with ``--logprobs-mode processed_logprobs`` and SGLang do; vLLM as it comes does at
    temperature 1.

    Attributes:
      url: of the server, without ``/v1``.
      model: its name there.
      sampling: how tokens are chosen; requests have their own number of them.
      vocab: of the model.
      slots: requests under way at a time.
      max_length: of a text, its answer included.
      seed: of the draws; None for that of ``sampling``.
      stop_ids: tokens that end every text.
      handover: called with every run's (params, version): sees to it that the server has them. None
        if it does.
      timeout: seconds in which the server must send something.
      retries, patience: how often in a row a text is asked for again, from where it stands, if the
        server is lost, and the seconds between.
      stats: of the latest run; ``steps`` and ``read_tokens`` are the server's secret.
    """

    url: str
    model: str
    sampling: SamplingConfig
    vocab: int
    slots: int
    max_length: int
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    handover: Callable[[Any, int], None] | None = None
    timeout: float = 600.0
    retries: int = 5
    patience: float = 10.0
    stats: Stats = field(init=False)

    def __post_init__(self):
        checks.at_least(self, slots=1, max_length=1, retries=0, patience=0)
        checks.above(self, timeout=0)
        self.stats = Stats(self.slots)

    def run(
        self,
        params,
        requests: Iterable[Request],
        *,
        version: int = 0,
        token_budget: int | None = None,
        on_tokens: Callable[[Request, list[int]], None] | None = None,
    ) -> Iterator[Completion]:
        """Completions, in the order in which texts end; see ``Engine.run``.

        After ``token_budget`` tokens the connections are closed, which is what stops a server.

        Raises:
          DataError: a request that cannot be written; a server that cannot be reached, refuses, or
            answers with something else than token ids and their log-probabilities.
          ConfigError: a thought with a least length whose close has several tokens.
        """
        if self.handover is not None:
            self.handover(params, version)
        self.stats, start = Stats(self.slots), time.perf_counter()
        events: queue.Queue = queue.Queue()
        waiting, under_way, leave = iter(requests), 0, threading.Event()
        try:
            while True:
                if token_budget is not None and self.stats.tokens >= token_budget:
                    leave.set()
                while under_way < self.slots and not leave.is_set():
                    if (request := next(waiting, None)) is None:
                        break
                    under_way += 1
                    text = self._checked(request)
                    threading.Thread(
                        target=self._write, args=(text, events, leave), daemon=True
                    ).start()
                if not under_way:
                    return
                text, tokens, ended = events.get()
                self.stats.turns += 1
                self.stats.tokens += len(tokens)
                self.stats.writing_seconds = time.perf_counter() - start
                if on_tokens is not None and tokens:
                    on_tokens(text.request, tokens)
                if isinstance(ended, Exception):
                    raise ended
                if ended is not None:
                    under_way -= 1
                    yield text.completion(ended, version)
        finally:
            leave.set()

    def _checked(self, request: Request) -> Text:
        request.check(self.vocab, self.max_length)
        thought = request.thought
        if thought is not None and thought.least and len(thought.close) > 1:
            raise ConfigError(
                f"{request.label}: a server cannot hold back a close of {len(thought.close)} "
                "tokens; use one of a single token, or a thought without a least length"
            )
        return Text.of(request)

    def _write(self, text: Text, events: queue.Queue, leave: threading.Event) -> None:
        """Writes a text to its end, in a thread of its own: its news go into ``events``."""
        try:
            reason: StopReason | None = None
            lost = 0
            while reason is None and not leave.is_set():
                before = len(text.tokens)
                try:
                    reason = self._part(text, events, leave)
                except _Lost:
                    lost = 1 if len(text.tokens) > before else lost + 1
                    if lost > self.retries:
                        raise
                    leave.wait(self.patience)
            events.put((text, [], reason or "unfinished"))
        except Exception as error:
            events.put((text, [], error))

    def _part(self, text: Text, events: queue.Queue, leave: threading.Event) -> StopReason | None:
        """Writes up to the next condition; why the text ended, if it did."""
        request, thought, written = text.request, text.request.thought, len(text.tokens)
        place, limit = len(request.prompt) + written, text.limit(self.max_length)
        stops = {*self.stop_ids, *request.stop_ids}
        if text.stopped(stops):
            return "stop"
        if place >= limit:
            return text.reason()
        marks, most, least = stops, limit - place, 0
        if thought is not None and thought.length(text.tokens) is None:
            if written >= thought.most:
                forced = list(thought.ending[written - thought.most :][:most])
                text.tokens += forced
                text.logprobs.append(np.zeros(len(forced), np.float32))
                return None
            marks = stops | {thought.close[-1]}
            most, least = min(most, thought.most - written), max(0, thought.least - written)
        before = len(text.tokens)
        for tokens, logprobs in self._stream(self._body(text, place, most, least, marks)):
            text.tokens += tokens
            text.logprobs.append(np.asarray(logprobs, np.float32))
            events.put((text, tokens, None))
            if leave.is_set():
                return None
        new = text.tokens[before:]
        if len(new) > most:
            raise DataError(f"{self.url}: {request.label} has {len(new)} tokens of {most}")
        if not new or (len(new) < most and new[-1] not in marks):
            raise _Lost(
                f"{self.url}: {request.label} was to have {most} tokens or one of {sorted(marks)} "
                f"at its end, and has {len(new)} that end with {new[-1:]}"
            )
        return None

    def _body(self, text: Text, place: int, most: int, least: int, marks: set[int]) -> dict:
        how, seed = self.sampling, self.sampling.seed if self.seed is None else self.seed
        draws = np.random.SeedSequence([seed, *text.request.name, place])
        filters = {"top_k": how.top_k} if how.top_k else {}
        return filters | {
            "model": self.model,
            "prompt": [*map(int, text.request.prompt), *text.tokens],
            "max_tokens": most,
            "min_tokens": least,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "min_p": how.min_p,
            "seed": int(draws.generate_state(1)[0] >> 1),
            "stop_token_ids": sorted(marks),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stream": True,
        }

    def _stream(self, body: dict) -> Iterator[tuple[list[int], list[float]]]:
        """(tokens, log-probabilities) as the server sends them."""
        asked = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
                for line in answer:
                    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                        continue
                    (choice,) = json.loads(line[5:])["choices"] or [{"token_ids": []}]
                    tokens = list(map(int, choice["token_ids"] or ()))
                    logprobs = list((choice.get("logprobs") or {}).get("token_logprobs") or ())
                    if len(tokens) != len(logprobs):
                        raise KeyError(f"{len(logprobs)} log-probabilities of {len(tokens)} tokens")
                    yield tokens, logprobs
        except urllib.error.HTTPError as error:
            said = error.read()[:300].decode(errors="replace")
            raise DataError(f"{self.url} refuses with status {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Lost(f"{self.url} does not answer: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.url} does not stream token ids with log-probabilities (it must know "
                f"return_token_ids): {error!r}"
            ) from error
