"""Flow-GRPO: groups that the policy draws, its chosen steps, the loss of them, the loop.

Shape suffixes: M clips, G captions, K clips of a caption, S chosen steps, B choices, T tokens, P
numbers in a patch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.config import to_plain
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.captions import Encoded, TextBank, distinct
from step_jax.data.clips import Reads, Shape
from step_jax.data.scenes import Scenes
from step_jax.inference.flow import Paths, Sampler
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow_policy import Choices
from step_jax.models.video.text_inputs import States
from step_jax.trainers.diffusion import groups
from step_jax.trainers.diffusion.groups import GroupData, GroupMaker, choice_schema
from step_jax.trainers.diffusion.grpo import FlowGRPO, Steps, flow_grpo, velocities
from step_jax.trainers.diffusion.sources import data_of
from tests.models import dit_oracle, small
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_loop_contract import CASES

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
SCENES = Scenes(frames=1, height=16, width=16, count=1, background="plain")
DATA = GroupData(
    scenes=SCENES, reward=("shape",), captions=6, groups=4, clips=3, refresh_every=2,
    sampler=Sampler(steps=5), choices=Choices(0.5, (1, 3)),
)  # fmt: skip
WIDTHS = (4, 2, 2)
MODEL = VideoDiT(
    8, 1, MHA(2, 8, qk_norm=RMSNorm(1e-6), position=Rope(axes=WIDTHS)), GELU(12), channels=3,
    text=(States("clip", 4, 3, padding=True), States("llm", 4, 3, "mlp")),
)  # fmt: skip
B, T, P = 4, 4, 3
TEXTS = ("clip", "llm")


# --- groups --------------------------------------------------------------------------------------


def bank() -> TextBank:
    texts = distinct(DATA.open(ONE, print).captions)
    tokens = np.arange(len(texts), dtype=np.int32)[:, None]
    return TextBank(texts, {"clip": Encoded(tokens, np.ones(len(texts), np.int32), "made")})


@pytest.fixture
def maker(monkeypatch):
    """Makes a maker whose policy draws the right scene where RIGHT says so, else another shape."""

    def drawn(params, model, texts, which_M, size, sampler, choices, *, number, **_):
        clips = []
        for m in range(len(which_M)):
            n, k = divmod(number + m, DATA.clips)
            scene = SCENES.draw(DATA.seed, n % DATA.captions)
            if not params[n % len(params)][k]:
                (kind,) = scene.kinds
                others = [s for s in ("circle", "square", "cross") if s != kind.shape]
                scene = replace(scene, kinds=(replace(kind, shape=others[0]),))
            clips.append(SCENES.render(scene))
        M, S = len(which_M), DATA.chosen
        states = np.arange(M * (S + 1), dtype=np.float32).reshape(M, S + 1, 1, 1)
        states = np.broadcast_to(states, (M, S + 1, T, P))
        return Paths(np.stack(clips), states, -np.arange(M * S, dtype=np.float32).reshape(M, S))

    monkeypatch.setattr(groups, "draw_paths", drawn)
    said: list[str] = []
    model = replace(MODEL, patch=(1, 8, 8))
    texts = bank()
    one = GroupMaker(DATA, DATA.open(ONE, print), model, texts, Execution(), ONE, said.append)
    return one, said, texts


def test_a_clip_is_worth_how_much_better_it_is_than_those_of_its_caption(maker):
    one, _, texts = maker
    right = [(1, 0, 0), (1, 1, 1), (0, 0, 0), (1, 1, 0)]
    drawn, figures = one.drawn(right, 0, FlowGRPO().algorithm)
    up, down = 2 / 3, -1 / 3
    deviation = np.sqrt((up**2 + 2 * down**2) / 2) + 1e-4
    expected = np.array([[up, down, down], [0, 0, 0], [0, 0, 0], [-down, -down, -up]]) / deviation
    np.testing.assert_allclose(drawn.advantages_M.reshape(4, 3), expected, rtol=1e-5)
    assert figures == {"reward": pytest.approx(6 / 12), "telling": 0.5}
    captions = DATA.open(ONE, print).captions
    for m, text in enumerate(drawn.texts_M):
        assert list(texts.index)[text] in captions[m // 3]
    later, _ = one.drawn(right, 2, FlowGRPO().algorithm)  # the captions behind them, then the first
    assert list(texts.index)[later.texts_M[0]] in captions[4]
    assert list(texts.index)[later.texts_M[-1]] in captions[1]


def test_a_round_is_learnt_from_once_before_it_is_learnt_from_again(maker):
    """Of clips that are better or worse than others, every chosen step with what belongs to it."""
    one, _, texts = maker
    drawn, _ = one.drawn([(1, 0, 0), (1, 1, 1), (0, 0, 0), (1, 1, 0)], 0, FlowGRPO().algorithm)
    first, second = (one.batch(drawn, 6, step) for step in (0, 1))
    shape = Shape(6, T, 1, (1, 16, 16))
    schema = choice_schema(shape, P, Reads((1, 8, 8)), {"clip": (1,)})
    assert {name: a.shape for name, a in first.items()} == {n: f.shape for n, f in schema.items()}
    seen = []
    for rows in (first, second):
        for b in range(6):
            m, s = divmod(int(rows["patches"][b, 0, 0]), DATA.chosen + 1)
            assert (rows["next"][b] == rows["patches"][b] + 1).all()
            assert rows["step"][b, 0] == 1 + s  # the first step follows the flow
            assert rows["logprob"][b, 0] == -(m * DATA.chosen + s)
            assert rows["advantage"][b, 0] == drawn.advantages_M[m] != 0
            assert rows["text/clip"][b, 0, 0] == drawn.texts_M[m]
            seen.append((m, s))
    assert len(set(seen)) == 12  # all of two groups of three clips with two steps each
    again = one.batch(drawn, 12, 1)
    assert len(set(again["logprob"].ravel())) == 12
    halves = [one.batch(drawn, 6, 1, i, 2)["logprob"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), second["logprob"])


def test_groups_that_are_all_alike_teach_nothing_and_say_so(maker):
    one, said, _ = maker
    drawn, figures = one.drawn([(1, 1, 1)], 4, FlowGRPO().algorithm)
    assert figures == {"reward": 1.0, "telling": 0.0}
    assert said == [
        "all clips of a caption that the policy of step 4 drew are alike in shape: there is "
        "nothing to learn of them"
    ]
    assert (one.batch(drawn, 6, 4)["advantage"] == 0).all()


def test_a_model_that_was_tuned_by_rewards_can_be_asked_what_it_learnt_from():
    artifact = SimpleNamespace(name="run", meta={"config": {"data": to_plain(DATA)}})
    assert data_of(artifact) == DATA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": Sampler(steps=5, guidance=3.0)}, "of guidance 1"),
        ({"sampler": Sampler("heun", steps=5)}, "they are by euler"),
        ({"sampler": Sampler(steps=2)}, "choices.steps ends at 3, and the sampler has 2 steps"),
        ({"groups": 0}, "groups is 0"),
        ({"clips": 1}, "clips is 1; it must be at least 2"),
    ],
)
def test_groups_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(DATA, **change).validate()


# --- the loss ------------------------------------------------------------------------------------

HOW = FlowGRPO(clip=1e-3, kl=0.5)
STEPS = Steps.of(Sampler(steps=5, shift=2.0), Choices(0.5, (1, 4)))


def choices():
    rng = np.random.default_rng(0)
    place = np.stack(np.meshgrid([0], [0, 1], [0, 1], indexing="ij"), -1).reshape(T, 3)
    x, reference = rng.standard_normal((2, B, T, P)).astype(np.float32)
    return {
        "patches": x,
        "next": x + 0.2 * rng.standard_normal((B, T, P)).astype(np.float32),
        "places": np.broadcast_to(place, (B, T, 3)).astype(np.int32),
        "step": np.array([[1], [2], [3], [1]], np.int32),
        "advantage": np.array([[1.0], [-1.0], [0.5], [-2.0]], np.float32),
        **{f"text/{n}": rng.standard_normal((B, 1, 3, 4)).astype(np.float32) for n in TEXTS},
        **{f"lengths/{n}": np.full((B, 1), 3, np.int32) for n in TEXTS},
        "reference": reference,
    }


def oracle(p, rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logarithm of the density, divergence, velocity) of each choice, float64, in the paper's
    convention: noise at 1, velocities of the other sign."""
    layers = [jax.tree.map(lambda a: a[0], p.blocks)]
    logprobs, kls, found = [], [], []
    for b in range(B):
        i = rows["step"][b, 0]
        sigma, after = 1 - float(STEPS.start[i]), 1 - float(STEPS.end[i])
        x = rows["patches"][b].astype(np.float64)
        text = [rows[f"text/{name}"][b, 0] for name in TEXTS]
        v = -dit_oracle.model(p, layers, x, 1 - sigma, rows["places"][b], WIDTHS, text, ())
        s = 0.5 * np.sqrt(sigma / (1 - sigma))
        mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * (after - sigma)
        deviation = s * np.sqrt(sigma - after)
        off = (rows["next"][b] - mean) / deviation
        logprobs.append(np.mean(-0.5 * off**2 - np.log(deviation * np.sqrt(2 * np.pi))))
        factor = (sigma - after) / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
        kls.append(factor * np.mean((v + rows["reference"][b]) ** 2))
        found.append(-v)
    return np.array(logprobs), np.array(kls), np.array(found)


def expected(p, rows) -> float:
    """The objective, its sign turned, as the paper has it."""
    logprob, kl, _ = oracle(p, rows)
    ratio = np.exp(logprob - rows["logprob"][:, 0])
    A = rows["advantage"][:, 0]
    gain = np.minimum(ratio * A, np.clip(ratio, 1 - HOW.clip, 1 + HOW.clip) * A)
    return float(np.mean(-gain + HOW.kl * kl))


def test_loss_and_gradient_of_choices_are_those_of_float64():
    """Ratios inside the bounds, and outside on either side; the gradient in three directions
    through all parameters, by differences of the oracle."""
    params, rows = small.params(MODEL), choices()
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    logprob, kl, velocity = oracle(p, rows)
    # of A > 0 a ratio above 1 + c is held, of A < 0 one below 1 - c: the first and the last here
    rows["logprob"] = (logprob - [0.01, 5e-4, -5e-4, -0.01]).astype(np.float32)[:, None]

    def loss(p, rows):
        out = flow_grpo(p, MODEL, rows, HOW, STEPS, small.execution())
        metrics = {name: a / w for name, (a, w) in out.metrics.items()}
        also = metrics, velocities(p, MODEL, rows, STEPS, small.execution())
        return sum(out.values().values()), also

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rows)
    compiled = compiled.compile(compiler_options=small.FAST_COMPILE)
    (found, (metrics, velocity_BTP)), gradient = jax.device_get(compiled(params, rows))
    np.testing.assert_allclose(velocity_BTP, velocity, rtol=1e-4, atol=1e-5)
    assert found == pytest.approx(expected(p, rows), rel=1e-5)
    assert metrics["clip_share"] == 0.5
    rng = np.random.default_rng(1)
    for _ in range(3):
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), p)
        there, back = (
            expected(jax.tree.map(lambda a, d, s=s: a + s * d, p, way), rows) for s in (1e-5, -1e-5)
        )
        along = sum(
            np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
        )
        assert along == pytest.approx((there - back) / 2e-5, rel=1e-3)


# --- the loop ------------------------------------------------------------------------------------


CASE = next(case for case in CASES if case.loop == "video-rl")
ALONE = "reference: {drawn}\n", "tokenizer: {drawn}/tokenizer, ", "loss: {{kl: 0.1}}\n"


def alone(folder: Path, name: str) -> str:
    """The contract's recipe of a fresh policy without a reference."""
    rest = CASE.rest
    for text in ALONE:
        assert text in rest
        rest = rest.replace(text, "")
    return replace(CASE, rest=rest).write(folder, name=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, last state) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_loop("video-rl", alone(folder, "whole"))


@pytest.mark.thorough
def test_a_policy_is_at_first_of_a_round_the_one_that_drew_it(whole):
    """What the sampler says of a step is what the trainer says of it: all ratios are 1."""
    folder, _ = whole
    ratios = [r["ratio"] for r in steps(folder / "whole")]
    assert ratios[0] == pytest.approx(1, abs=2e-6) and ratios[3] == pytest.approx(1, abs=2e-6)
    assert all(abs(ratios[i] - 1) > 1e-5 for i in (1, 2, 4, 5))
    assert steps(folder / "whole")[0]["clip_share"] == 0
    records = [json.loads(line) for line in open(folder / "whole" / "metrics.jsonl")]
    rounds = [r for r in records if r.get("name") == "groups"]
    assert [r["step"] for r in rounds] == [0, 3] and all(0 < r["telling"] <= 1 for r in rounds)


@pytest.mark.thorough
def test_a_run_that_is_cut_off_within_a_round_ends_in_the_same_bits(whole):
    """The round is in the checkpoint, whose policy is no longer the one that drew it."""
    folder, state = whole
    run_loop("video-rl", alone(folder, "cut"), cut_after=4)
    again = run_loop("video-rl", alone(folder, "cut"))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert steps(folder / "cut") == steps(folder / "whole")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a run that starts from its reference."""
    folder = tmp_path_factory.mktemp("tuned")
    diffusion = next(case for case in CASES if case.loop == "diffusion")
    run_loop("diffusion", diffusion.write(folder, name="drawn"))
    run_loop("video-rl", from_reference(folder, "tuned"))
    return folder


def from_reference(folder: Path, name: str) -> str:
    start = f"init_from: {{{{artifact: {folder / 'drawn'}}}}}\n"
    return CASE.write(folder, start, name, drawn=folder / "drawn")


@pytest.mark.slow
def test_a_policy_that_is_its_reference_does_not_diverge_from_it_and_then_does(tuned):
    kls = [r["loss/kl"] for r in steps(tuned / "tuned")]
    assert kls[0] == pytest.approx(0, abs=1e-9) and min(kls[1:]) > 0


@pytest.mark.slow
def test_microbatches_and_a_mesh_change_nothing(tuned):
    flags = ["--parallel.fsdp", "2", "--training.accumulation", "2"]
    run_loop("video-rl", from_reference(tuned, "parts"), *flags, devices=2)
    for got, want in zip(steps(tuned / "parts"), steps(tuned / "tuned"), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text.dropout", "0.1"], "set text.dropout to 0"),
        (["--flow.shift", "4"], "the times are those of data.sampler"),
        (["--loss.kl", "0"], "nothing is compared with the reference"),
        (["--reference", "null"], "a fresh model is none"),
        (["--loss.clip", "1"], "low is 1.0"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_words(tmp_path, capsys, flags, message):
    path = CASE.write(tmp_path, drawn=tmp_path / "nowhere")
    assert main(["video-rl", path, *flags]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err
