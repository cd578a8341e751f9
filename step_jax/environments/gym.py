"""reasoning-gym's tasks as they are, with its own scores (``pip install reasoning-gym``).

What version 0.1.25 needs to be trusted with is stated here and tried by tests over all its tasks.
"""

from __future__ import annotations

import ast
import functools
import json
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.yaml_strict import did_you_mean
from step_jax.environments.problems import Drawn, Problem, Problems, Task
from step_jax.environments.replies import Thinking, conclusion
from step_jax.environments.verifiers import Record, Verifier

Setting = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

REFUSED = {
    "composite": "it mixes other tasks: name one of them",
    "codeio": "some of the programs that it runs give another answer each time",
    "puzzle24": "its scores take 24 made of any four numbers, not of those that are given",
}
#: tasks whose stored answer is none, but which keep a right one elsewhere
_WORKED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}
#: tasks that make a list of all their problems first -> how long a list
_LISTED = {"acre": 1000, "gsm_symbolic": 100_000, "list_functions": 100_000, "word_ladder": 20_000}
#: milliseconds to make one problem, where it is more than 20 (two busy cores)
SLOW = {
    "advanced_geometry": 129, "countdown": 64, "futoshiki": 2114, "game_of_life": 57,
    "game_of_life_halting": 24, "gsm_symbolic": 41, "intermediate_integration": 494, "jugs": 23,
    "knight_swap": 3259, "polynomial_equations": 164, "polynomial_multiplication": 51,
    "quantum_lock": 60, "rearc": 22, "rubiks_cube": 85, "simple_integration": 43, "sokoban": 93,
    "sudoku": 51, "word_ladder": 58, "zebra_puzzles": 500,
}  # fmt: skip
#: tasks that hand a reply to eval(): only a literal is let through, since what a reply changes in
#: the process would change the scores of others
_EVALUATED = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
#: tasks that hand a reply to sympy.parse_expr, which is eval(): only mathematics is let through
_PARSED = {
    "countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"
}  # fmt: skip
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "exp", "log", "ln", "sqrt", "pi", "abs", "Abs",
}  # fmt: skip
_SHARED = threading.Lock()
_MOST_BITS = 31  # of a place: some tasks hand it to generators that take no more


@dataclass(frozen=True)
class ReasoningGym(Verifier):
    """reasoning-gym's score of the conclusion, from 0 to 1.

    name: of the task.
    settings: of the task, other than its defaults.
    """

    name: str
    settings: dict[str, Setting] = field(default_factory=dict)
    thinking: Thinking | None = Thinking()
    kind: ClassVar[str] = "reasoning_gym"

    def load(self) -> None:
        dataset(self.name, self.settings)

    def check(self, record: Record, name: str) -> None:
        pass  # it is the task's own

    def score(self, reply: str, record: Record) -> float:
        said = conclusion(reply, self.thinking)
        if not said or not harmless(self.name, said):
            return 0.0
        return float(dataset(self.name, self.settings).score_answer(said, record["entry"]))


def harmless(name: str, answer: str) -> bool:
    """Whether a reply can be handed to a score that evaluates it."""
    if name in _EVALUATED and answer.lstrip().startswith(("[", "(")):
        try:
            ast.literal_eval(answer.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
        return True
    if name in _EVALUATED:
        return re.fullmatch(r"[\w\s.*]*", answer) is not None and "__" not in answer
    if name in _PARSED:
        words = re.findall(r"[^\W\d]\w*", answer)
        known = all(len(word) == 1 or word in _FUNCTIONS for word in words)
        return known and re.fullmatch(r"[\w\s+\-*/^().]*", answer) is not None
    return True


@dataclass(frozen=True)
class GymTask(Task):
    """A task of reasoning-gym.

    name: of the task.
    settings: of the task, other than its defaults.
    prompt: the question, with ``{question}`` or any key of the problem's metadata in braces, for
      models to which the library's own words are too many: ``{expression}=`` of ``chain_sum``.
    thinking: the marks of a reply.
    """

    name: str
    settings: dict[str, Setting] = field(default_factory=dict)
    prompt: str = "{question}"
    thinking: Thinking = Thinking()
    kind: ClassVar[str] = "reasoning_gym"

    @property
    def verifier(self) -> Verifier:
        return ReasoningGym(self.name, self.settings, self.thinking)

    @property
    def slow(self) -> str | None:
        """What to say of a task whose problems take long to make."""
        if self.name not in SLOW:
            return None
        return f"{self.name} takes about {SLOW[self.name]:,} ms to make a problem"

    def open(self, heldout_fraction: float) -> Problems:
        """Raises `ConfigError` for a task that there is not, or that cannot be trusted."""
        self.draw(random.Random(0))
        return Drawn(self.draw, heldout_fraction)

    def draw(self, rng: random.Random) -> Problem:
        source = dataset(self.name, self.settings)
        most = _LISTED.get(self.name)
        place = rng.getrandbits(_MOST_BITS) if most is None else rng.randrange(most)
        entry = _made(source, place)
        worked = _WORKED.get(self.name)
        answer = entry["answer"] if worked is None else worked(entry["metadata"])
        return Problem(
            name=f"{self.name}/{place}",
            question=self._prompt(entry),
            record={"entry": entry},
            content=entry["question"],
            answer=answer,
        )

    def _prompt(self, entry: Mapping[str, Any]) -> str:
        known = {**entry["metadata"], "question": entry["question"]}
        try:
            return self.prompt.format_map(known)
        except KeyError as error:
            key = str(error.args[0])
            raise ConfigError(
                f"prompt names {{{key}}}, which problems of {self.name} do not have"
                f"{did_you_mean(key, known)}; there are {', '.join(map(str, known))}"
            ) from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise ConfigError(f"prompt {self.prompt!r} cannot be filled in: {error}") from None


def _made(source: Any, place: int) -> dict[str, Any]:
    """The problem at a place. Some tasks draw from the generators that all of a process share, so
    these are set to the place meanwhile."""
    with _SHARED:
        before = random.getstate(), np.random.get_state()
        random.seed(place)
        np.random.seed(place)
        try:
            return source[place]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def dataset(name: str, settings: Mapping[str, Setting]) -> Any:
    """reasoning-gym's data set; its seed is 0, and a place decides the rest.

    Raises:
      ConfigError: the library, the task or a setting is not there, or the task is refused.
    """
    return _dataset(name, json.dumps(settings, sort_keys=True))


@functools.lru_cache(8)
def _dataset(name: str, settings: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(
            "this task is reasoning-gym's, which is not installed: pip install reasoning-gym"
        ) from None
    if name not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {name!r}{did_you_mean(name, DATASETS)}")
    if name in REFUSED:
        raise ConfigError(f"reasoning-gym's {name} is refused: {REFUSED[name]}")
    given = json.loads(settings)
    if fixed := sorted({"seed", "size"} & set(given)):
        raise ConfigError(f"settings of {name}: {fixed[0]} is not yours to set: leave it out")
    size = _LISTED.get(name, 2**_MOST_BITS)
    try:
        return reasoning_gym.create_dataset(name, seed=0, size=size, **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"settings of reasoning-gym's {name}: {error}") from error
