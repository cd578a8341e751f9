"""Conversations about sums, with thoughts, of a seed: something to fine-tune on without a network.

    python configs/sft/arithmetic.py chats/arithmetic --conversations 6000

writes ``conversations.jsonl``, of which a run holds part out. A thought goes through a sum term by
term; half of the conversations have a second question, about the first answer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

ASKS = ("What is {}?", "Please add up {}.", "{} =", "How much is {}?")


def turn(start: int | None, rng: random.Random) -> tuple[str, str, int]:
    """(question, thought, answer); ``start``: of a question about the answer before it."""
    terms = [rng.randint(1, 50) for _ in range(rng.randint(1 if start is not None else 2, 3))]
    signs = [rng.choice("+-") for _ in terms]
    if start is None:
        total, question = terms[0], str(terms[0])
        terms, signs = terms[1:], signs[1:]
    else:
        total, question = start, "that"
    steps = []
    for sign, term in zip(signs, terms, strict=True):
        value = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {value}")
        question += f" {sign} {term}"
        total = value
    return rng.choice(ASKS).format(question), "; ".join(steps), total


def conversation(rng: random.Random) -> dict:
    messages, answer = [], None
    for _ in range(rng.randint(1, 2)):
        question, thought, answer = turn(answer, rng)
        said = {"role": "assistant", "reasoning_content": thought, "content": str(answer)}
        messages += [{"role": "user", "content": question}, said]
    return {"messages": messages}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="where the files go")
    options.add_argument("--conversations", type=int, default=6000)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    rng = random.Random(asked.seed)
    asked.folder.mkdir(parents=True, exist_ok=True)
    path = asked.folder / "conversations.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(asked.conversations):
            file.write(json.dumps(conversation(rng)) + "\n")
    print(f"{asked.conversations:,} conversations in {path}")


if __name__ == "__main__":
    main()
