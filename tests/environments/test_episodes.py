from __future__ import annotations

import json
from dataclasses import replace

import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError, DataError
from step_jax.environments.arithmetic import ChainSum
from step_jax.environments.episodes import SingleTurn, step_all
from step_jax.environments.pacore import Cached, CoordinatedProblems, CoordinatedRound, Round
from step_jax.environments.pool import Pool, PoolConfig
from step_jax.environments.replies import Thinking
from step_jax.environments.sandbox import Limits
from step_jax.environments.tools import Calculator, Python, Tools, ToolUse
from step_jax.environments.verifiers import Numeric

TASK = ChainSum(thinking=Thinking())


@pytest.fixture(scope="module")
def pool():
    with Pool(Numeric(), PoolConfig(processes=1)) as pool:
        yield pool


@pytest.fixture(scope="module")
def problems():
    return TASK.open(0.1)


def call(name="calculator", **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_single_turn_ends_with_its_score(pool, problems):
    environment = SingleTurn(problems, pool)
    episodes = [environment.reset(0, index) for index in range(3)]
    assert episodes == [environment.reset(0, index) for index in range(3)]
    replies = [episode.problem.reply(TASK.thinking) for episode in episodes]
    replies[1] = "<think>hm"
    steps = step_all(environment, episodes, replies)
    assert [(step.done, step.reward) for step in steps] == [(True, 1.0), (True, 0.0), (True, 1.0)]
    assert [message["role"] for message in steps[0].episode.messages] == ["user", "assistant"]


def test_a_tool_is_called_and_the_last_reply_is_scored(pool, problems):
    environment = ToolUse(problems, pool)
    episode = environment.reset(0, 0)
    expression = episode.problem.question.removesuffix("=")
    step = environment.step(
        episode, f"<think>{call(expression='1')}</think>" + call(expression=expression)
    )
    assert not step.done and step.reward == 0.0
    assert step.messages == ({"role": "tool", "content": episode.problem.answer},)
    last = environment.step(step.episode, f"It is {step.messages[0]['content']}.")
    assert last.done and last.reward == 1.0 and last.episode.turns == 2
    roles = [message["role"] for message in last.episode.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_an_episode_ends_after_the_most_turns(pool, problems):
    environment = ToolUse(problems, pool, Tools(most_turns=2))
    step = environment.step(environment.reset(0, 0), call(expression="1") + call(expression="2"))
    assert [message["content"] for message in step.messages] == ["1", "2"]
    assert environment.step(step.episode, call(expression="1")).done


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (call(expression="(1+2)/4"), "3/4"),
        (call(expression="1/0"), "error: it divides by 0"),
        (call(expression="9" * 2000), "error: 2000 characters"),
        (call("python", program="1"), "error: a call has the name of a tool, one of calculator"),
        (call(formula="1"), "error: calculator takes the argument expression"),
        ("<tool_call>{</tool_call>", "error: the call is no JSON"),
        ("<tool_call>[]</tool_call>", "error: a call has the name"),
    ],
)
def test_a_policy_is_told_what_came_of_its_call(text, told):
    tools = Tools()
    (asked,) = tools.calls(text)
    assert tools.answer(asked).startswith(told)


def test_what_is_only_thought_calls_nothing():
    assert Tools().calls(f"<think>{call(expression='1')}") == []


def test_tools_are_read_from_recipes_and_described_by_name():
    tools = parse_config(Tools, "tools: [{kind: python, limits: {seconds: 1}}, {kind: calculator}]")
    assert tools.tools == (Python(Limits(seconds=1)), Calculator())
    assert [tool["function"]["name"] for tool in tools.described()] == ["python", "calculator"]
    with pytest.raises(ConfigError, match="of different kinds"):
        parse_config(Tools, "tools: [{kind: calculator}, {kind: calculator}]")


@pytest.mark.system
@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("print(6 * 7)", "42\n"),
        ("print(1)\n1 / 0", "1\nerror: ZeroDivisionError: division by zero"),
        ("print('x' * 5000)", "x" * 2000 + "... (5,001 characters)"),
        ("while True: pass", "error: it "),
        ("raise SystemExit(3)", "error: code 3"),
    ],
)
def test_the_python_tool_tells_what_a_program_printed(program, told):
    tool = Python(Limits(seconds=5, cpu_seconds=1))
    found = Tools((tool,)).answer(json.dumps({"name": "python", "arguments": {"program": program}}))
    assert found == told or (told.endswith("it ") and found.startswith(told))


# --- rounds -------------------------------------------------------------------------------------

SHORT = Round(prompt="{references}|{question}", reference="{text},")


def test_a_round_shows_each_conclusion_once_in_an_order_of_its_key():
    said = [str(i) for i in range(9)] + [None, ""]
    one = SHORT.ask("q", said, 0)
    assert one == SHORT.ask("q", said, 0) != SHORT.ask("q", said, 1)
    assert sorted(one.partition("|")[0].split(",")) == ["", *map(str, range(9))]
    assert one.endswith("|q") and SHORT.ask("q", [None, ""], 0) == "q"
    assert "Answer 2:\n7\n" in Round().ask("q", ["7", "7"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt: '{question}'}", "prompt lacks {references}"),
        ("{reference: x}", "reference lacks {text}"),
        ("{prompt: '{question} {references} {answer}'}", "nothing is known of: 'answer'"),
    ],
)
def test_a_round_that_leaves_something_out_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Round, text)


def test_a_coordinated_round_is_a_problem_unless_its_messages_are_too_good(problems):
    problem = problems.train(0, 0)
    rounds = CoordinatedRound(SHORT, messages=(4, 6), accuracy=(0.1, 0.5))
    cached = Cached(problem, tuple("rrrwwwwwww"), (True,) * 3 + (False,) * 7)
    seen = set()
    for index in range(60):
        made = rounds.problem(cached, 0, index)
        assert made == rounds.problem(cached, 0, index)
        if made is None:
            continue
        drawn = made.question.partition("|")[0].strip(",").split(",")
        assert 4 <= len(drawn) <= 6 and 0.1 <= drawn.count("r") / len(drawn) <= 0.5
        assert (made.record, made.content) == (problem.record, problem.content)
        assert made.answer is None
        seen.add(len(drawn))
    assert seen == {4, 5, 6}
    assert rounds.problem(Cached(problem, ("r",) * 9, (True,) * 9), 0, 0) is None
    assert rounds.problem(Cached(problem, ("r",) * 3, (True,) * 3), 0, 0) is None


def test_coordinated_rounds_are_an_environment_of_one_turn(pool, problems):
    def cached(problem, right):
        said = [problem.answer] * right + ["wrong"] * (10 - right)
        return Cached(problem, tuple(said), tuple(text != "wrong" for text in said))

    hard = [cached(problems.train(0, index), 3) for index in range(5)]
    easy = [cached(problems.train(0, index), 10) for index in range(5, 8)]
    held = [cached(problem, 10) for problem in problems.heldout(2)]
    rounds = CoordinatedRound(SHORT, messages=(4, 6))
    environment = SingleTurn(CoordinatedProblems(hard + easy, held, rounds), pool)
    episodes = [environment.reset(0, index) for index in range(12)]
    assert episodes == [environment.reset(0, index) for index in range(12)]
    contents = {episode.problem.content for episode in episodes}
    assert len(contents) > 1 and contents <= {cached.problem.content for cached in hard}
    assert "wrong," in episodes[0].messages[0]["content"]
    answers = {cached.problem.content: cached.problem.answer for cached in hard}
    assert environment.step(episodes[0], answers[episodes[0].problem.content]).reward == 1.0
    assert [p.content for p in environment.problems.heldout(2)] == [c.problem.content for c in held]
    with pytest.raises(DataError, match="none has a share of right ones from 0 to 0.75"):
        CoordinatedProblems(easy, held, rounds).train(0, 0)
    with pytest.raises(DataError, match="2 problems are trained on and held out"):
        CoordinatedProblems(held, held, rounds)
    wide = CoordinatedRound(messages=(11, 11))
    with pytest.raises(DataError, match="of 0 with the 11 conclusions .* .2 have fewer"):
        CoordinatedProblems(easy, held, wide).heldout(1)
    few = [replace(held[0], conclusions=("1",), correct=(False,)), held[1]]  # one is passed over
    (left,) = CoordinatedProblems(easy, few, rounds).heldout(1)
    assert left.content == held[1].problem.content
