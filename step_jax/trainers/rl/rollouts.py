"""The host's side of reinforcement learning: what is asked, what was answered, what it was worth.

:class:`Rollouts` draws problems, has the engine answer them, has the answers verified while others
are still written, and hands out batches of whole groups. All that it remembers between two batches
is :meth:`Rollouts.carried`, arrays for a checkpoint: a run that was killed goes on with the very
answers that it had.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.environments.pool import Pool, Score
from step_jax.environments.problems import Problem, Problems
from step_jax.inference.engine import Engine
from step_jax.inference.requests import Request
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.served import Served
from step_jax.models.text.decoder import Decoder
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.config import Config, Rollout
from step_jax.trainers.rl.samples import Batch, Sample
from step_jax.trainers.rl.trajectory import FINISH
from step_jax.trainers.rl.turns import Turns

#: problems in a row whose prompts are too long, after which something else is wrong
_MOST_TOO_LONG = 1000
#: batches' worth of groups that dynamic sampling tries before it takes what there is
_MOST_DULL = 16


class Rollouts:
    """Answers to train on; one for each run. Use it in a ``with`` statement.

    With a mesh of its own and a lag, batches are written in a thread, each by the parameters that a
    run without would have written it by.
    """

    def __init__(
        self,
        config: Rollout,
        *,
        prompts: int,
        samples: int,
        batches: int,
        keep_telling: bool,
        seed: int,
        problems: Problems,
        engine: Engine | Served,
        encode: Callable[[Problem], list[int]],
        decode: Callable[[Sequence[int], Sequence[int]], str],
        pool: Pool | None,
        send: Callable[[Any], Any] | None = None,
        beside: bool = False,
        turns: Turns | None = None,
    ):
        """Raises DataError if the first problems' prompts are all too long.

        Args:
          prompts, samples: of a batch.
          batches: of the run.
          keep_telling: groups whose answers all score the same are replaced by others.
          encode: the prompt of a problem. decode: (prompt, answer) -> the answer's text.
          pool: of verifiers; None on processes that are told the scores by the first.
          send: copies parameters to the engine's mesh, if that is another than theirs.
          beside: the engine has devices of its own: with a lag it writes while others learn. On the
            same devices two threads would start programs in orders of their own, and wait for ever.
          turns: what tools tell replies that call them; None without tools.
        """
        self._config, self._prompts, self._samples = config, prompts, samples
        self._batches, self._keep_telling, self._seed = batches, keep_telling, seed
        self._problems, self._engine, self._pool = problems, engine, pool
        self._encode, self._decode = encode, decode
        self._cursor = 0  # of the next problem
        self._counts: Counter[str] = Counter()
        self._verifying = 0.0  # seconds of the batch under way
        self._next_problem()  # raises if none fits
        self._cursor = 0
        self._written = 0  # batches
        self._open: dict[int, dict[int, Sample]] = {}  # groups under way: index -> sample -> it
        self._ready: list[list[Sample]] = []  # whole groups that no batch has yet
        self._queue: deque[Batch] = deque()  # batches that are not learned from yet
        self._send, self._turns = send, turns
        self._thread = ThreadPoolExecutor(1) if beside and config.lag else None
        self._jobs: deque[Future[None]] = deque()
        self._leaving = threading.Event()

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *exc):
        self._leaving.set()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def batch(self, params: Any, number: int) -> Batch:
        """Batch ``number`` (0-based); call it in their order.

        Args:
          params: of the policy, which has learned from ``number`` batches.
        """
        start = time.perf_counter()
        if self._send is not None:
            params = self._send(params)
        if self._thread is None:
            self._catch_up(params, number)
        else:
            self._jobs.append(self._thread.submit(self._catch_up, params, number))
            while self._jobs and (not self._queue or self._jobs[0].done()):
                self._jobs.popleft().result()
        batch = self._queue.popleft()
        ages = number - np.concatenate([s.versions for s in batch.samples])
        figures = {
            "staleness": float(ages.mean()),
            "staleness_max": float(ages.max()),
            "rollout_wait_s": time.perf_counter() - start,
        }
        return Batch(batch.samples, batch.figures | figures)

    def _catch_up(self, params: Any, number: int) -> None:
        """Writes what batch ``number`` and its lag need, by parameters of that version."""
        ahead = min(number + 1 + self._config.lag, self._batches)
        while self._written < ahead:
            self._queue.append(self._write(params, number))
            self._written += 1

    def prompt(self, index: int) -> list[int]:
        """The prompt's tokens of a problem."""
        return self._encode(self._problems.train(self._seed, index))

    # --- writing -------------------------------------------------------------------------------

    def _write(self, params: Any, version: int) -> Batch:
        start, self._verifying = time.perf_counter(), 0.0
        self._counts.clear()
        total, written, steps, begun = self._prompts, 0, 0, self._cursor
        dull: list[list[Sample]] = []
        while len(self._ready) < total:
            finished = self._round(params, version)
            stats = self._engine.stats
            written, steps = written + stats.tokens, steps + stats.steps * stats.slots
            for group in finished:
                same = len({sample.reward for sample in group}) == 1
                self._counts["groups"] += 1
                self._counts["same"] += same
                (dull if same and self._keep_telling else self._ready).append(group)
            if len(dull) >= _MOST_DULL * total:  # the task is too easy, or too hard, by now
                self._ready += dull[: total - len(self._ready)]
        groups, self._ready = self._ready[:total], self._ready[total:]
        batch = [sample for group in groups for sample in group]
        seconds = time.perf_counter() - start
        cut = sum(sample.finish != "stop" for sample in batch)
        figures = {
            "reward": float(np.mean([sample.reward for sample in batch])),
            "answer_tokens": float(np.mean([len(sample.tokens) for sample in batch])),
            "truncated_share": cut / len(batch),
            "same_reward_share": self._counts["same"] / max(1, self._counts["groups"]),
            "problems_drawn": float(self._cursor - begun),
            "prompts_too_long": float(self._counts["too_long"]),
            "verifier_failures": float(self._counts["failures"]),
            "rollout_s": seconds,
            "verifying_s": self._verifying,
            **({} if self._turns is None else {"tool_calls": float(self._counts["calls"])}),
            "rollout_tokens_per_s": written / seconds,
        }
        if steps:  # of a server they are not known
            figures["slots_busy"] = written / steps
        return Batch(batch, figures)

    def _round(self, params: Any, version: int) -> list[list[Sample]]:
        """Has the engine write once; the groups that are whole then, in the order of problems."""
        wanted = max(self._prompts, self._config.in_flight) - len(self._ready)
        while len(self._open) < wanted:
            index = self._next_problem()
            self._open[index] = {i: Sample(index, i) for i in range(self._samples)}
        scores: dict[tuple[int, int], Any] = {}
        written = self._engine.run(
            params,
            self._requests(),
            version=version,
            token_budget=self._config.token_budget,
            on_tokens=self._go_on,
        )
        for done in written:
            index, i = done.request.name
            self._open[index][i] = sample = self._open[index][i].gone_on(done)
            if sample.finish is None or self._pool is None:
                continue
            before, reply = np.split(sample.tokens, [sample.begin])
            text = self._decode([*done.request.prompt, *before], reply.tolist())
            if self._turns is not None and self._turns.ask((index, i), sample, text):
                continue
            record = self._problems.train(self._seed, index).record
            scores[index, i] = self._pool.submit(text, record)
        if self._turns is not None:
            self._go_on_with(self._turns.told(), version)
        self._take(scores)
        whole = [
            index
            for index, group in sorted(self._open.items())
            if all(sample.reward is not None for sample in group.values())
        ]
        return [list(self._open.pop(index).values()) for index in whole]

    def _go_on(self, request: Request, tokens: list[int]) -> None:
        if self._leaving.is_set():
            raise InterruptedError("the run ends; nobody waits for these answers")

    def _requests(self) -> Iterator[Request]:
        for index, group in sorted(self._open.items()):
            prompt = self.prompt(index)
            for i, sample in sorted(group.items()):
                if sample.finish is None:
                    yield sample.request(prompt, self._config.max_new_tokens, (index, i))

    def _next_problem(self) -> int:
        for _ in range(_MOST_TOO_LONG):
            index, self._cursor = self._cursor, self._cursor + 1
            if len(self.prompt(index)) <= self._config.max_prompt_tokens:
                return index
            self._counts["too_long"] += 1
        raise DataError(
            f"{_MOST_TOO_LONG} problems in a row have prompts of more than "
            f"{self._config.max_prompt_tokens} tokens: raise rollout.max_prompt_tokens"
        )

    # --- what comes back -----------------------------------------------------------------------

    def _go_on_with(self, told: Mapping[tuple[int, ...], Sequence[int]], version: int) -> None:
        for (index, i), ids in told.items():
            sample = self._open[index][i]
            self._open[index][i] = sample.told(ids, version, self._config.max_new_tokens)
        self._counts["calls"] += len(told)

    def _take(self, scores: Mapping[tuple[int, int], Any]) -> None:
        """Puts the rewards where they belong; every process gets those of the first."""
        start = time.perf_counter()
        unscored = sorted(
            (index, i)
            for index, group in self._open.items()
            for i, sample in group.items()
            if sample.finish is not None and sample.reward is None
        )
        rewards = np.zeros(len(unscored), np.float32)
        if self._pool is not None:
            found: list[Score] = [scores[name].result() for name in unscored]
            rewards = np.asarray([score.total for score in found], np.float32)
            self._counts["failures"] += sum(score.failure is not None for score in found)
        if jax.process_count() > 1:
            rewards = multihost_utils.broadcast_one_to_all(rewards)
        for (index, i), reward in zip(unscored, rewards.tolist(), strict=True):
            self._open[index][i] = replace(self._open[index][i], reward=reward)
        self._verifying += time.perf_counter() - start

    # --- what a checkpoint keeps ---------------------------------------------------------------

    def carried(self) -> dict[str, np.ndarray]:
        """All that is not a function of the configuration, as arrays. Waits for what is written."""
        while self._jobs:
            self._jobs.popleft().result()
        places = [
            *((-2, s) for _, group in sorted(self._open.items()) for s in group.values()),
            *((-1, s) for group in self._ready for s in group),
            *((i, s) for i, batch in enumerate(self._queue) for s in batch.samples),
        ]
        kept = [sample for _, sample in places]
        flat: dict[str, list[np.ndarray]] = defaultdict(list)
        for s in kept:
            for name in ("tokens", "logprobs", "versions", "chosen"):
                flat[name].append(getattr(s, name))
            for i, routing in enumerate(s.routing):  # (L, T, K): the texts one after the other
                flat[f"routing{i}"].append(np.moveaxis(routing, 1, 0))
        arrays = {name: np.concatenate(parts) for name, parts in flat.items()}
        lengths = [(len(s.tokens), s.routing[0].shape[1] if s.routing else 0) for s in kept]
        finish = [-1 if s.finish is None else FINISH.index(s.finish) for s in kept]
        rewards = [np.nan if s.reward is None else s.reward for s in kept]
        known = np.isfinite(rewards) if kept else np.zeros(0, bool)
        figures = {
            f"figures.{name}": np.asarray([batch.figures[name] for batch in self._queue])
            for name in (self._queue[0].figures if self._queue else ())
        }
        return (
            arrays
            | figures
            | {
                "counters": np.asarray([self._cursor, self._written], np.int32),
                "names": np.asarray(
                    [(place, s.index, s.sample) for place, s in places], np.int32
                ).reshape(-1, 3),
                "lengths": np.asarray(lengths, np.int32).reshape(-1, 2),
                "finish": np.asarray(finish, np.int32),
                "rewards": np.where(known, rewards, 0.0).astype(np.float32),
                "rewarded": known,
            }
        )

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on with what :meth:`carried` gave."""
        self._cursor, self._written = (int(n) for n in arrays["counters"])
        self._open, self._ready, self._queue = {}, [], deque()
        figures = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith("figures.")}
        routed = sorted(name for name in arrays if name.startswith("routing"))
        text = route = 0
        for row, (place, index, i) in enumerate(arrays["names"].tolist()):
            length, routes = arrays["lengths"][row].tolist()
            part = {
                name: arrays[name][text : text + length]
                for name in ("tokens", "logprobs", "versions", "chosen")
                if length
            }
            routing = tuple(np.moveaxis(arrays[n][route : route + routes], 0, 1) for n in routed)
            text, route = text + length, route + routes
            finish = int(arrays["finish"][row])
            sample = Sample(
                index,
                i,
                **part,
                finish=None if finish < 0 else FINISH[finish],  # type: ignore[arg-type]
                reward=float(arrays["rewards"][row]) if arrays["rewarded"][row] else None,
                routing=routing if routes else (),
            )
            self._put(place, sample)
        for i, batch in enumerate(self._queue):
            batch.figures.update({name: float(a[i]) for name, a in figures.items()})

    def _put(self, place: int, sample: Sample) -> None:
        if place == -2:
            self._open.setdefault(sample.index, {})[sample.sample] = sample
            return
        if place == -1:
            if not self._ready or len(self._ready[-1]) == self._samples:
                self._ready.append([])
            self._ready[-1].append(sample)
            return
        while len(self._queue) <= place:
            self._queue.append(Batch([], {}))
        self._queue[place].samples.append(sample)


def slots_on(config: Config, sharding: Sharding) -> int:
    """The slots of a run, filled up to what the mesh divides."""
    ways = sharding.ways("batch")
    return -(-config.rollout.slots // ways) * ways


def make_engine(
    config: Config, policy: Decoder, tokenizer: Tokenizer, sharding: Sharding, temperature: float
) -> Engine:
    """The engine of a run."""
    return Engine(
        policy,
        SamplingConfig(temperature=temperature),
        slots=slots_on(config, sharding),
        max_length=config.rollout.context,
        seed=config.run.seed,
        stop_ids=tokenizer.stop_ids,
        execution=config.execution,
        sharding=None if sharding.mesh.size == 1 and config.rollout.parallel is None else sharding,
        keep_routing=config.rollout.replay_routing,
    )


def evaluated(
    engine: Engine | Served,
    params: Any,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    step: int,
    decode: Callable[[Sequence[int], Sequence[int]], str],
    turns: Turns | None,
) -> list[list[tuple[Sample, str]]]:
    """Answers to every prompt with their last turns in words, ``samples`` of each; what they are
    depends on ``step`` too."""
    done: dict[tuple[int, ...], Sample] = {}
    words: dict[tuple[int, ...], str] = {}
    names = [(step, index, i, 0) for index in range(len(prompts)) for i in range(samples)]
    asked = [Request(prompts[name[1]], max_new_tokens, name) for name in names]
    while asked:
        for written in engine.run(params, asked):
            name = written.request.name
            done[name] = sample = done.get(name, Sample(name[1], name[2])).gone_on(written)
            before, reply = np.split(sample.tokens, [sample.begin])
            words[name] = decode([*written.request.prompt, *before], reply.tolist())
            if turns is not None and jax.process_index() == 0:
                turns.ask(name, sample, words[name])
        told = {} if turns is None else turns.told()
        for name, ids in told.items():
            done[name] = done[name].told(ids, 0, max_new_tokens)
        asked = [
            done[name].request(prompts[name[1]], max_new_tokens, name)
            for name in told
            if done[name].finish is None
        ]
    return [[(done[n], words[n]) for n in group] for group in itertools.batched(names, samples)]
