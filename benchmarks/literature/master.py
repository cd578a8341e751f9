"""The literature master: continued pretraining on a style, fine-tuning, preference tuning, judged.

    python benchmarks/literature/master.py WORK

runs all of it, and goes on where it was killed. The texts are those of ``texts.py``, the loops
those of ``step-jax`` with the recipes beside this file. It ends with a table, of what each model
writes after openings that nobody has seen:

- style: the score of a word classifier trained on text that no model saw (``style.py``), and the
  share of writings that it takes for scripture;
- divergence from held-out scripture in words, and repetition;
- how often the reward model, trained apart, prefers it to what the base wrote after the opening;
- loss on held-out general text.

``WORK/written/`` has every text; the samples shown are the first ones.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from step_jax import MeshConfig, Sharding, load_artifact
from step_jax.data import Heldout
from step_jax.evaluation.heldout import make_evaluator
from step_jax.evaluation.judge import Shown, Tally, compare
from step_jax.evaluation.rewards import score
from step_jax.inference.generate import generate
from step_jax.inference.sampling import SamplingConfig
from step_jax.tokenizers.chat import encode_request

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import style  # noqa: E402
import texts  # noqa: E402

OPENING, ANSWER = 8, 45  # words of a prompt, of an answer that is learned
WRITTEN, ROWS = 48, 50  # tokens that are written, texts written together
HELDOUT, TUNING, DRAWN = 50, 80, 3  # openings of each kind; answers to each when tuning
MODELS = ("base", "continued", "sft", "preference")
CHATS = ("sft", "preference")
CHATS_READ = 2000  # conversations for fine-tuning: more than its steps read
ONE = Sharding.build(MeshConfig(), jax.devices()[:1])


def opening(text: str) -> tuple[str, str]:
    """(the first words, the words after them)."""
    found = text.split()
    return " ".join(found[:OPENING]), " ".join(found[OPENING:][:ANSWER])


def trained(work: Path, loop: str, name: str, *flags: Any) -> None:
    """Trains a recipe; nothing happens if that is done."""
    if (work / name / "finished").exists():
        return
    command = [sys.executable, "-m", "step_jax.cli", loop, HERE / f"{name}.yaml"]
    places = ["--run.directory", work / name, "--data.cache-dir", work / "cache"]
    subprocess.run([str(word) for word in (*command, *places, *flags)], check=True)
    (work / name / "finished").touch()


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, computed once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), ensure_ascii=False, indent=0))
    return json.loads(path.read_text())


def written(work: Path, name: str, openings: list[str], seed: int) -> list[str]:
    """What a model writes after each opening; one that was tuned on chats, in answer to it."""
    artifact = load_artifact(str(work / name), ONE)
    tokenizer, made = artifact.tokenizer, []
    for first in range(0, len(openings), ROWS):
        some = openings[first : first + ROWS]
        ids = [
            encode_request(tokenizer, [{"role": "user", "content": text}])
            if name in CHATS
            else tokenizer.encode_prompt(text)
            for text in some
        ]
        done = generate(
            artifact.params,
            artifact.model,
            ids,
            SamplingConfig(max_new_tokens=WRITTEN, temperature=0.8, top_p=0.95, seed=seed),
            max_length=128,
            stop_ids=tokenizer.stop_ids,
            execution=artifact.execution,
            sharding=ONE,
            requests=range(first, first + len(some)),
        )
        made += [
            tokenizer.decode_continuation(asked, tokens).strip()
            for asked, tokens in zip(ids, done.tokens, strict=True)
        ]
    return made


def passages(path: Path) -> list[str]:
    found = [json.loads(line)["text"] for line in path.open()]
    random.Random(0).shuffle(found)
    return found


def make_chats(work: Path) -> None:
    """Openings of the Old Testament, and how they go on."""
    openings = map(opening, passages(work / "style" / "old_testament.jsonl")[:CHATS_READ])
    records = [{"prompt": first, "completion": rest} for first, rest in openings if rest]
    texts.write(work / "chats" / "chats.jsonl", records)


def make_pairs(work: Path) -> None:
    """Of several answers to an opening the best and the worst, by a classifier of training text."""
    old = passages(work / "style" / "old_testament.jsonl")
    novels = passages(work / "general" / "novels.jsonl")
    judge = style.Classifier(old, novels)
    openings = [opening(text)[0] for text in old[:TUNING] + novels[: 2 * TUNING]]
    drawn = [
        kept(work / "drawn" / f"{seed}.json", lambda s=seed: written(work, "sft", openings, s))
        for seed in range(DRAWN)
    ]
    records = []
    for first, *answers in zip(openings, *drawn, strict=True):
        whole = [answer for answer in answers if len(answer.split()) > 5]
        ranked = sorted((judge.score(a) - 2 * style.repetition(a), a) for a in whole)
        if len(ranked) > 1 and ranked[-1][0] - ranked[0][0] > 0.1:
            records.append({"prompt": first, "chosen": ranked[-1][1], "rejected": ranked[0][1]})
    texts.write(work / "pairs" / "pairs.jsonl", records)


def make_judged(work: Path) -> None:
    """For the reward model: scripture against plain text, and against itself in another order.

    Real text only: it sees nothing that a model wrote.
    """
    known, rng = json.loads((work / "judges.json").read_text()), random.Random(0)
    records = []
    for i, (better, plain) in enumerate(zip(known["style"], known["plain"], strict=False)):
        first, rest = opening(better)
        worse, wrong = opening(plain)
        if i % 2:
            wrong = " ".join(rng.sample(rest.split(), len(rest.split())))
        elif i % 4:
            first = worse  # an opening of either kind
        records.append({"prompt": first, "chosen": rest, "rejected": wrong})
    whole = [r for r in records if all(map(str.strip, r.values())) and r["chosen"] != r["rejected"]]
    texts.write(work / "judged" / "judged.jsonl", whole)


def general_loss(work: Path, name: str) -> float:
    """Nats per token of the general text that the base held out."""
    artifact = load_artifact(str(work / name), ONE)
    heldout = Heldout.load(work / "base" / "heldout", artifact.tokenizer)
    evaluate = make_evaluator(artifact.model, artifact.execution, ONE, 4, 256)
    return evaluate(artifact.params, heldout)["nll"]


def scores_of(work: Path, openings: list[str], answers: list[str]) -> np.ndarray:
    talks = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": text or "..."}]
        for first, text in zip(openings, answers, strict=True)
    ]
    return score(load_artifact(str(work / "reward"), ONE), talks, ONE)


def preferred(ours: np.ndarray, theirs: np.ndarray) -> Tally:
    """How often the first is scored higher. A score knows no order: both showings say the same."""
    difference = ours - theirs
    shown = [Shown("", "", "")] * len(difference)
    return compare(lambda _: np.concatenate([difference, -difference]).tolist(), shown)


def train(work: Path) -> None:
    """Every stage in turn."""
    if not (work / "prompts.json").exists():
        texts.main(work)
    trained(work, "pretrain", "base", "--data.path", work / "general")
    # most is text of before: what is not read again is forgotten
    mixture = [
        {"path": str(work / name), "weight": weight}
        for name, weight in (("style", 0.3), ("general", 0.7))
    ]
    start = ["--init-from.artifact", work / "base", "--data.sources", json.dumps(mixture)]
    trained(work, "pretrain", "continued", *start)
    for loop, name, start, data, make in (
        ("sft", "sft", "continued", "chats", make_chats),
        ("reward", "reward", "base", "judged", make_judged),
        ("preference", "preference", "sft", "pairs", make_pairs),
    ):
        if not (work / data).exists():
            make(work)
        trained(work, loop, name, "--init-from.artifact", work / start, "--data.path", work / data)


def report(work: Path) -> None:
    """The table, and the first samples."""
    known, prompts = (json.loads((work / f"{n}.json").read_text()) for n in ("judges", "prompts"))
    judge = style.Classifier(known["style"], known["plain"])
    real = {kind: prompts[kind][HELDOUT : 2 * HELDOUT] for kind in ("style", "plain")}
    right = [(judge.score(text) > 0) == (kind == "style") for kind in real for text in real[kind]]
    print(f"classifier on unseen real passages: {np.mean(right):.1%} of {len(right)} right")
    openings = [opening(text)[0] for kind in ("plain", "style") for text in prompts[kind][:HELDOUT]]
    answers = {
        name: kept(work / "written" / f"{name}.json", lambda n=name: written(work, n, openings, 1))
        for name in MODELS
    }
    rewards = {name: scores_of(work, openings, answers[name]) for name in MODELS}
    losses = {name: general_loss(work, name) for name in MODELS}
    columns = ("model", "after", "style", "as scripture", "divergence", "repetition", "by base")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in MODELS:
        for kind, part in (("plain", slice(HELDOUT)), ("scripture", slice(HELDOUT, None))):
            some = answers[name][part]
            scored = np.asarray([judge.score(text) for text in some])
            tally = preferred(rewards[name][part], rewards["base"][part])
            low, high = tally.interval()
            print(
                f"| {name} | {kind} | {scored.mean():+.3f} | {(scored > 0).mean():.0%} | "
                f"{style.divergence(some, real['style']):.3f} | "
                f"{np.mean([style.repetition(text) for text in some]):.3f} | "
                + ("|" if name == "base" else f"{tally.rate:.1%} ({low:.1%} to {high:.1%}) |")
            )
    print("\n| model | loss on general text | by the base |\n|---|---|---|")
    for name in MODELS:
        print(f"| {name} | {losses[name]:.4f} | {losses[name] / losses['base'] - 1:+.2%} |")
    for number in (0, 1, HELDOUT, HELDOUT + 1):
        print(f"\nafter {openings[number]!r}:")
        for name in MODELS:
            print(f"- {name}: {answers[name][number]}")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    report(Path(sys.argv[1]))
