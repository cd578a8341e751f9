"""How long verifiers take in their processes, and how often they are wrong.

    python benchmarks/verifiers.py --samples 400
    python benchmarks/verifiers.py --samples 60 --code      # with the sandbox

For each verifier: right replies (worked solutions), and wrong ones (solutions of other problems
with another answer). ``missed`` is the share of right ones without full score, ``fooled`` of wrong
ones with it; milliseconds are of one reply in its process, and of the wall clock over all replies.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from step_jax.environments.arithmetic import ChainSum, Countdown
from step_jax.environments.code import Code
from step_jax.environments.gym import GymTask
from step_jax.environments.mathematics import Math
from step_jax.environments.pool import Pool, PoolConfig
from step_jax.environments.problems import Problem
from step_jax.environments.replies import Thinking
from step_jax.environments.sandbox import Limits
from step_jax.environments.verifiers import Numeric, Record, Verifier

Sample = tuple[str, Record, bool]


def of_task(task, verifier: Verifier, samples: int) -> Iterator[Sample]:
    """Each solution to its own problem and to another one."""
    problems = task.open(0.1)
    drawn = [problems.train(0, index) for index in range(samples)]
    for problem, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        yield written(problem, task.thinking), problem.record, True
        if other.answer != problem.answer:
            yield written(other, task.thinking), problem.record, False


def written(problem: Problem, thinking: Thinking) -> str:
    return thinking.write(problem.thought or "so", problem.answer or "")


def fractions(samples: int) -> Iterator[Sample]:
    """Fractions in a box, right and off by one, to answers that are written in other ways."""
    rng = np.random.default_rng(0)
    for a, b in rng.integers(2, 999, (samples, 2)):
        record = {"answer": [f"{a}/{b}", rf"\frac{{{a}}}{{{b}}}"][int(a) % 2]}
        yield rf"so it is \boxed{{\frac{{{3 * a}}}{{{3 * b}}}}}", record, True
        yield rf"so it is \boxed{{\frac{{{a + 1}}}{{{b}}}}}", record, False


def programs(samples: int) -> Iterator[Sample]:
    for k in range(samples):
        tests = [{"call": "f", "args": [x], "result": x * k + 1} for x in (0, 7)]
        yield f"```python\ndef f(x):\n    return {k} * x + 1\n```", {"tests": tests}, True
        yield f"```python\ndef f(x):\n    return {k + 1} * x + 1\n```", {"tests": tests}, False


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=200)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--code", action="store_true", help="programs, too (needs bubblewrap)")
    asked = options.parse_args()
    chain = ChainSum(thinking=Thinking())
    rows: list[tuple[str, Verifier, list[Sample]]] = [
        ("numeric, chain_sum", Numeric(), list(of_task(chain, Numeric(), asked.samples))),
    ]
    for task in (Countdown(), *map(GymTask, ("chain_sum", "gcd", "letter_counting", "maze"))):
        name = f"{task.verifier.kind}, {getattr(task, 'name', task.kind)}"
        rows.append((name, task.verifier, list(of_task(task, task.verifier, asked.samples))))
    rows.append(("math, fractions", Math(), list(fractions(asked.samples))))
    if asked.code:
        code = Code(limits=Limits(seconds=30))
        rows.append(("code, two calls each", code, list(programs(asked.samples))))
    print("| verifier | start s | ms median | p95 | wall ms | missed | fooled | failed |")
    print("|---|---|---|---|---|---|---|---|")
    for name, verifier, samples in rows:
        begun = time.perf_counter()
        with Pool(verifier, PoolConfig(processes=asked.processes, seconds=120)) as pool:
            ready = time.perf_counter()
            scores = pool.score([(reply, record) for reply, record, _ in samples])
            wall = (time.perf_counter() - ready) / len(samples) * 1000
        full = np.array([score.total >= 1 for score in scores])
        right = np.array([is_right for _, _, is_right in samples])
        took = np.array([score.seconds for score in scores]) * 1000
        missed, fooled = np.mean(~full[right]), np.mean(full[~right])
        numbers = [
            f"{ready - begun:.1f}",
            f"{np.median(took):.2f}",
            f"{np.quantile(took, 0.95):.2f}",
        ]
        numbers += [f"{wall:.2f}", f"{missed:.3f}", f"{fooled:.3f}"]
        print(f"| {name} | {' | '.join(numbers)} | {sum(pool.failures.values())} |", flush=True)


if __name__ == "__main__":
    main()
