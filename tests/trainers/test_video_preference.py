"""Video-DPO: pairs that the policy draws, what is kept of them, the frozen reference.

Shape suffixes: B pairs, 2 winner and loser.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.config import to_plain
from step_jax.core.errors import CheckpointError, ConfigError, DataError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.captions import Encoded, TextBank, distinct
from step_jax.data.clip_pairs import PairDataset, pair_schema
from step_jax.data.clips import ClipDataset, Reads
from step_jax.data.latents import Clip, LatentFolder, write_latents
from step_jax.data.rendered import captions_of
from step_jax.data.scenes import Scenes
from step_jax.inference.flow import Sampler
from step_jax.interop.artifacts import InitFrom, Start, load_artifact
from step_jax.models.context import Execution
from step_jax.trainers import reference
from step_jax.trainers.diffusion import pairs
from step_jax.trainers.diffusion.pairs import PairData, PairMaker, best_and_worst
from step_jax.trainers.diffusion.sources import data_of
from tests.models import small
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_loop_contract import CASES
from tests.training.test_flow_preference import MODEL

CASE = {case.loop: case for case in CASES}
ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
SCENES = Scenes(frames=1, height=16, width=16, count=1, background="plain")
DATA = PairData(
    scenes=SCENES, path="", reward=("shape",), captions=6, clips=3, sampler=Sampler(steps=2)
)
RIGHT = {0: (0, 1, 0), 1: (1, 1, 1), 2: (0, 0, 1), 3: (0, 0, 0), 4: (1, 0, 0), 5: (1, 1, 0)}


def bank_of(data: PairData) -> TextBank:
    texts = distinct(data.open(ONE, print).captions)
    tokens = np.arange(len(texts), dtype=np.int32)[:, None]
    return TextBank(texts, {"clip": Encoded(tokens, np.ones(len(texts), np.int32), "made")})


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """Makes makers whose policy draws the right scene, or another shape, as RIGHT says."""

    def drawn(params, model, texts, which_N, size, sampler, *, number, **_):
        shapes = ("circle", "square", "triangle", "cross")
        for n in range(len(which_N)):
            i, k = divmod(n, DATA.clips)
            scene = SCENES.draw(DATA.seed, i)
            if not params["all"][0] and not RIGHT[i][k]:
                (kind,) = scene.kinds
                other = shapes[(shapes.index(kind.shape) + 1) % len(shapes)]
                scene = replace(scene, kinds=(replace(kind, shape=other),))
            yield SCENES.render(scene)

    monkeypatch.setattr(pairs, "draw_each", drawn)
    said: list[str] = []

    def make(data=DATA, model=MODEL):
        data = replace(data, path=str(tmp_path))
        one = PairMaker(
            data, data.open(ONE, print), model, bank_of(data), Execution(), ONE, said.append
        )
        return one, said

    return make


def policy(every: bool = False, other: float = 0.0):
    return {"all": np.array([float(every), other], np.float32)}


def test_the_best_and_the_worst_clip_of_a_caption_are_a_pair_and_ties_are_none():
    assert best_and_worst([0.5, 1.0, 0.0, 1.0, 0.0]) == (1, 2)
    assert best_and_worst([0.5, 0.5]) is None


def test_a_round_has_a_pair_of_every_caption_whose_clips_differ(maker):
    one, said = maker()
    winners, losers = one.open(one.drawn(policy(), 0))
    scenes = [SCENES.draw(0, i) for i in (0, 2, 4, 5)]  # of 1 and 3 all clips are alike
    assert [text for (text,) in winners.captions] == [text for (text,) in losers.captions]
    for i, scene in enumerate(scenes):
        assert winners.captions[i][0] in captions_of(scene)
        np.testing.assert_array_equal(winners.latents(i), SCENES.render(scene))
        assert not np.array_equal(losers.latents(i), winners.latents(i))
    assert set(winners.scalars["reward"]) == {1.0} and set(losers.scalars["reward"]) == {0.0}
    assert said == [
        "the policy of step 0 drew 3 clips of each of 6 captions: a mean reward of 0.444, 4 pairs"
    ]
    one.drawn(policy(), 0)  # it is there already
    assert len(said) == 1


def test_pairs_are_named_by_policy_reward_and_round(maker):
    every = replace(DATA, refresh_every=4)
    names = [
        maker()[0].drawn(policy(), 0),
        maker()[0].drawn(policy(other=1.0), 0),
        maker(replace(DATA, reward=("shape", "colour")))[0].drawn(policy(), 0),
        maker(replace(DATA, sampler=Sampler(steps=3)))[0].drawn(policy(), 0),
        maker(every)[0].drawn(policy(), 4),
    ]
    assert len(set(names)) == 5
    assert maker(every)[0].drawn(policy(), 0) == names[0]  # the first round is that of any refresh
    folders = [LatentFolder.open(Path(maker()[0]._folder(n)) / "winners") for n in names]
    assert [folder.manifest["made_by"] for folder in folders] == names


def test_captions_whose_clips_are_all_alike_leave_no_pair_and_say_so(maker):
    with pytest.raises(DataError, match="each of the 6 captions are alike in shape .*mean is 1"):
        maker()[0].drawn(policy(every=True), 0)


def test_pairs_that_are_gone_or_damaged_are_not_learnt_from(maker, tmp_path):
    one, _ = maker()
    name = one.drawn(policy(), 0)
    (losers,) = tmp_path.glob("*/losers/*.npy")
    losers.write_bytes(losers.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged files .*put them back, or branch from a step"):
        one.open(name)
    with pytest.raises(DataError, match=r"is no folder of latents.*put them back"):
        one.open("0" * 64)


def test_a_model_that_was_tuned_on_pairs_can_be_asked_what_it_learnt_from():
    """By who draws with it, and by a student whose teacher it is."""
    artifact = SimpleNamespace(name="run", meta={"config": {"data": to_plain(DATA)}})
    assert data_of(artifact) == DATA
    assert len(data_of(artifact).open(ONE, print).captions) == 6


def test_rounds_begin_every_so_many_steps():
    data = replace(DATA, refresh_every=3)
    assert [step for step in range(8) if data.begins(step)] == [0, 3, 6]
    assert [data.round(step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [step for step in range(8) if DATA.begins(step)] == [0]


def test_both_clips_of_a_pair_have_one_text_and_share_their_noise_or_do_not(tmp_path):
    bank = bank_of(DATA)
    rng = np.random.default_rng(0)
    sides = []
    for name in ("winners", "losers"):
        captions = [captions_of(SCENES.draw(0, i))[i % 2] for i in range(5)]
        clips = [
            Clip(rng.standard_normal((1, 2, 2, 3)), (text,), {"reward": 1}) for text in captions
        ]
        write_latents(tmp_path / name, clips, "")
        side = LatentFolder.open(tmp_path / name)
        sides.append(
            ClipDataset(
                side, bank, Reads((1, 1, 1)), rows={(1, 2, 2): 4}, packs=None, seed=3, dropout=0.3
            )
        )
    shared, apart = (PairDataset(*sides, shared_noise=shared) for shared in (True, False))
    schema = pair_schema(sides[0].schema(sides[0].shapes[0]))
    seen = []
    for step in range(5):
        one, other = shared.batch(step), apart.batch(step)
        assert {name: a.shape for name, a in one.items()} == {n: f.shape for n, f in schema.items()}
        for name, a in one.items():
            if name != "samples":
                np.testing.assert_array_equal(a, other[name])
            if name != "patches":
                np.testing.assert_array_equal(a[:, 0], a[:, 1])
        assert not np.any(one["patches"][:, 0] == one["patches"][:, 1])
        assert not set(other["samples"][:, 0].flat) & set(other["samples"][:, 1].flat)
        np.testing.assert_array_equal(one["samples"][:, 0], other["samples"][:, 0])
        halves = [shared.batch(step, i, 2) for i in range(2)]
        np.testing.assert_array_equal(
            np.concatenate([h["patches"] for h in halves]), one["patches"]
        )
        seen.append(one["patches"][:, 0])
    clips = {clip.tobytes() for clip in np.concatenate(seen)}
    assert len(clips) == 5  # every pair


def held(params, model=MODEL, tokenizer="words"):
    artifact = SimpleNamespace(
        params=params, model=model, step=4, tokenizer=SimpleNamespace(hash=tokenizer)
    )
    artifact.require = lambda kind, what: artifact.model
    return artifact


def test_another_reference_is_refused(monkeypatch):
    params = small.params(MODEL)
    found = {"start": held(params), "wide": held(params, replace(MODEL, depth=2))}
    found |= {"start@4": found["start"], "words": held(params, tokenizer="other")}
    monkeypatch.setattr(reference, "load_artifact", lambda name, *_: found[name])
    init, begin = InitFrom("start"), Start(MODEL)
    words = SimpleNamespace(hash="words")
    _, facts = reference.frozen_reference(None, init, begin, words, ONE, None)
    assert facts["name"] == "start@4"
    assert reference.frozen_reference(None, init, begin, words, ONE, facts)[1] == facts
    with pytest.raises(ConfigError, match="the reference wide is another model than the policy"):
        reference.frozen_reference("wide", None, begin, words, ONE, None)
    with pytest.raises(ConfigError, match="the reference words has another tokenizer"):
        reference.frozen_reference("words", None, begin, words, ONE, None)
    found["start@4"] = held(jax.tree.map(lambda a: a + np.float32(1e-3), params))
    with pytest.raises(CheckpointError, match="it was start@4, and start@4 has other parameters"):
        reference.frozen_reference(None, init, begin, words, ONE, facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": ()}, "names no statement"),
        ({"reward": ("motion",)}, r"has \['motion'\], and in scenes of one frame nothing moves"),
        ({"clips": 1}, "clips is 1; it must be at least 2"),
        ({"refresh_every": 0}, "refresh_every is 0"),
    ],
)
def test_pairs_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(DATA, **change).validate()


def test_a_model_that_draws_something_else_is_refused(maker):
    with pytest.raises(ConfigError, match="the data have 3 channels, the model 4"):
        maker(model=replace(MODEL, channels=4))
    with pytest.raises(ConfigError, match="the model continues pictures"):
        maker(model=replace(MODEL, first_frame=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, last state) of an undisturbed run of the loops' contract and of its reference."""
    folder = tmp_path_factory.mktemp("whole")
    run_loop("diffusion", CASE["diffusion"].write(folder, name="drawn"))
    return folder, run_loop("video-preference", recipe(folder, "whole"))


def recipe(folder: Path, name: str, start: str = "") -> str:
    places = {"drawn": folder / "drawn", "cache": folder / name / "cache"}
    return CASE["video-preference"].write(folder, start, name, **places)


@pytest.mark.slow
def test_pairs_drawn_again_are_the_same_in_a_run_that_was_cut_off(whole):
    """Its folder of pairs is another one, which a branch or a new start would not find filled."""
    folder, state = whole
    run_loop("video-preference", recipe(folder, "again"), cut_after=4)
    again = run_loop("video-preference", recipe(folder, "again"))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    made = [
        sorted(p.name for p in (folder / n / "cache/pairs").iterdir()) for n in ("whole", "again")
    ]
    assert made[0] == made[1] and len(made[0]) == 2  # two rounds, of two policies
    for path in (folder / "whole/cache/pairs").glob("*/*/*"):
        other = folder / "again" / path.relative_to(folder / "whole")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_the_reference_has_no_memory_and_no_part_in_the_state(whole):
    folder, state = whole
    assert set(state.learners) == {"model"} and state.learners["model"].average is None
    meta = load_artifact(str(folder / "whole"), ONE, arrays=False).meta
    drawn = load_artifact(str(folder / "drawn"), ONE)
    pinned = {
        "name": f"{folder / 'drawn'}@6",
        "parameters": reference.digest_of_params(drawn.params),
    }
    assert meta["reference"] == pinned


@pytest.mark.slow
def test_microbatches_change_nothing_and_independent_noise_does(whole):
    folder, _ = whole
    run_loop("video-preference", recipe(folder, "parts"), "--training.accumulation", "2")
    for got, want in zip(steps(folder / "parts"), steps(folder / "whole"), strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=1e-6)
    apart = ["--loss.shared-noise", "false", "--training.steps", "1"]
    run_loop("video-preference", recipe(folder, "apart"), *apart)
    (one,), (first, *_) = steps(folder / "apart"), steps(folder / "whole")
    assert one["error_winner"] == pytest.approx(first["error_winner"], rel=1e-5)
    assert one["error_loser"] != pytest.approx(first["error_loser"], rel=1e-3)


@pytest.mark.slow
def test_a_policy_that_is_its_reference_prefers_nothing_and_learns_to(whole):
    """The reference's errors are of the same noise at the same time as the policy's."""
    folder, _ = whole
    start = f"init_from: {{{{artifact: {folder / 'drawn'}}}}}\n"
    once = ["--data.refresh-every", "12", "--training.steps", "12"]
    run_loop("video-preference", recipe(folder, "start", start), *once)
    first, *_, last = steps(folder / "start")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(first["reward_chosen"]) < 1e-4 and abs(first["reward_rejected"]) < 1e-4
    assert last["reward_margin"] > 0 and last["loss"] < first["loss"]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_pairs(whole, capsys):
    folder, _ = whole
    more = ["--training.steps", "8", "--data.captions", "13"]
    assert main(["video-preference", recipe(folder, "whole"), *more]) == ExitCode.FAILURE
    assert "was made with other data: asked" in capsys.readouterr().err


def test_guided_pairs_need_a_model_that_learns_without_text(tmp_path, capsys):
    flags = ["--text.dropout", "0", "--data.sampler.guidance", "3"]
    code = main(["video-preference", recipe(tmp_path, "run"), *flags])
    assert code == ExitCode.CONFIG
    assert "data.sampler.guidance needs a model that also" in capsys.readouterr().err
