"""What every loop must do: resume, run on any mesh, refuse, leave an artifact, be planned, go on.

The loops are those of the table, and the one outside the package that docs/writing_a_loop.md shows.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.checkpoint import Checkpointer
from step_jax.checkpoint.manifest import committed_steps, step_name
from step_jax.cli.main import main
from step_jax.core.errors import CheckpointError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.interop.artifacts import load_artifact
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.reward import RewardModel
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.vae import VideoVAE
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers import LOOPS
from step_jax.trainers.reward import as_reward_model
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_pretrain import WORDS

EXAMPLE = str(Path(__file__).parents[2] / "docs" / "examples" / "counting.py")
COMMON = """
run: {{directory: {run}, checkpoint: {{every_steps: 2}}, logging: {{sinks: []}}}}
optimizer: {{kind: adamw, learning_rate: 1e-2, eps: {eps}, schedule: {{kind: constant}}}}
"""
DECODER = """
  width: 16
  init: {{kind: fixed, std: 0.2}}
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mfa, heads: 2, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 32}}
"""
TRANSFORMER = """
  width: 16
  depth: 2
  channels: 3
  patch: [1, 4, 4]
  attention: {{kind: mha, heads: 2, head_dim: 8, position: {{kind: rope, axes: [4, 2, 2]}}}}
  mlp: {{kind: gelu, hidden: 32}}
  text:
    - kind: tower
      name: clip
      tokens: 4
      vocab: 320
      width: 16
      depth: 1
      attention: {{kind: mha, heads: 2, head_dim: 8}}
      mlp: {{kind: gelu, hidden: 16}}
"""
UNSAMPLED = "sample: {{tokens: 0}}\n"
READS = f"""
evaluation: {{{{every_steps: 0, tokens: 100}}}}
{UNSAMPLED}execution: {{{{dtype: float32}}}}
"""
DATA = "data: {{{{path: {{{0}}}, vocab_size: 300, sequence_length: {1}, cache_dir: {{cache}}}}}}\n"
TEXT, CHATS = DATA.format("text", 16), DATA.format("chats", 64)
PICTURES = "frames: 1, height: 12, width: 12, count: 1, background: plain"
PAIRS, VERDICTS = DATA.format("pairs", 64), DATA.format("verdicts", 64)


@dataclass(frozen=True)
class Case:
    """A loop with a recipe of seconds.

    recipe: with ``model``; ``start`` is what stands in its place with ``init_from``.
    kind: of its model.
    steps: the setting of that name.
    compared: the loop whose run it is compared with.
    eps: of AdamW, which makes a step of a full rate out of the last bits of a gradient that is 0:
      real and drawn clips pull the discriminator's last bias in opposite ways.
    """

    loop: str
    model: str
    rest: str
    kind: type
    steps: str = "training.steps"
    compared: str = ""
    eps: float = 1e-8

    def write(self, folder: Path, start: str = "", name: str = "run", **places) -> str:
        """The recipe's path; ``start`` replaces the model."""
        path = folder / f"{name}.yaml"
        head = start or f"model:{self.model}"
        loop = f"loop: {self.loop}\n"
        path.write_text(
            (loop + head + COMMON + self.rest).format(run=folder / name, eps=self.eps, **places)
        )
        return str(path)


CASES = [
    Case("pretrain", DECODER, "training: {{steps: 6, batch_size: 8}}\n" + TEXT + READS, Decoder),
    Case("sft", DECODER, "training: {{steps: 6, batch_size: 8}}\n" + CHATS + READS, Decoder),
    Case(
        "rl",
        DECODER + "tokenizer: {tokenizer}\n",
        "training: {{steps: 6, prompts: 4, samples: 4}}\n"
        "rollout: {{max_new_tokens: 6, max_prompt_tokens: 6, slots: 2, lag: 1, token_budget: 40}}\n"
        "problems: {{task: {{kind: addition, digits: [1, 1]}}, "
        "verifier: {{kind: format, thinking: {{open: '', close: '#'}}}}}}\n"
        "evaluation: {{problems: 4, samples: 1}}\n"
        "execution: {{dtype: float32, loss_chunks: 1}}\n",
        Decoder,
    ),
    Case(
        "preference",
        DECODER + "  vocab: 300\n",
        "training: {{steps: 6, batch_size: 8}}\nreference: {base}\nloss: {{kind: kto}}\n"
        + VERDICTS.replace("vocab_size: 300", "tokenizer: {base}/tokenizer")
        + READS,
        Decoder,
        compared="pretrain",
    ),
    Case(
        "reward",
        DECODER,
        "training: {{steps: 6, batch_size: 8}}\n" + PAIRS + READS.replace(UNSAMPLED, ""),
        RewardModel,
    ),
    Case(
        "diffusion",
        TRANSFORMER,
        "training: {{steps: 6, batch_size: 16}}\n"
        f"data: {{{{kind: scenes, clips: 64, families: [{{{{{PICTURES}}}}}]}}}}\n"
        "sample: {{count: 0}}\n"
        "execution: {{dtype: float32}}\n",
        VideoDiT,
    ),
    Case(
        "video-preference",
        TRANSFORMER,
        "training: {{steps: 6, batch_size: 16}}\nreference: {drawn}\n"
        "text: {{tokenizer: {drawn}/tokenizer}}\n"
        f"data: {{{{scenes: {{{{{PICTURES}}}}}, path: {{cache}}/pairs, reward: [shape], "
        "captions: 12, clips: 3, refresh_every: 3, sampler: {{steps: 2}}}}\n"
        "loss: {{beta: 5}}\n"  # which multiplies the last bits of errors: 500 by default
        "sample: {{count: 0}}\n"
        "execution: {{dtype: float32}}\n",
        VideoDiT,
        compared="diffusion",
    ),
    Case(
        "video-rl",
        TRANSFORMER,
        "training: {{steps: 6, batch_size: 8}}\nreference: {drawn}\n"
        "text: {{tokenizer: {drawn}/tokenizer, dropout: 0}}\n"
        f"data: {{{{scenes: {{{{{PICTURES}}}}}, reward: [colour, shape], captions: 12, groups: 4, "
        "clips: 4, refresh_every: 3, sampler: {{steps: 4}}, choices: {{steps: [0, 2]}}}}\n"
        "loss: {{kl: 0.1}}\n"
        "sample: {{count: 0}}\n"
        "execution: {{dtype: float32}}\n",
        VideoDiT,
        compared="diffusion",
    ),
    Case(
        "vae",
        "\n  latents: 2\n  stem: 4\n  encoder_widths: [8]\n  decoder_widths: [8]\n"
        "  encoder_blocks: 1\n  decoder_blocks: 1\n  temporal: []\n  head_width: 16\n"
        "  groups: 4\n  attention: false\n  chunk: 5\n",
        "training: {{steps: 6, batch_size: 8}}\n"
        "data: {{kind: scenes, scenes: [{{frames: 5, height: 12, width: 12}}]}}\n"
        "loss: {{adversarial: {{model: {{widths: [4], groups: 4}}, after: 2}}}}\n"
        "evaluation: {{clips: 0}}\n",
        VideoVAE,
        eps=1e-3,
    ),
    Case(EXAMPLE, DECODER + "  vocab: 14\n", "steps: 6\nrows: 8\nlength: 8\n", Decoder, "steps"),
]


#: the loops that others are compared with, and what recipes call their undisturbed runs
COMPARED = {"pretrain": "base", "diffusion": "drawn"}


def loops(*quick: str):
    """Every loop, of which only these are tried in every run of the tests: what is proven is a part
    that loops share, and the others could break it only by not using it."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(c, marks=() if c.loop in quick else pytest.mark.slow) for c in CASES],
        ids=[Path(case.loop).stem for case in CASES],
    )


ONE = Sharding.build(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("contract")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(40):
        text = " ".join(f"{w} {n % 10}=" for n, w in enumerate(rng.choice(WORDS, 60)))
        (folder / "text" / f"{i}.txt").write_text(text)
    (folder / "chats").mkdir()
    with open(folder / "chats" / "a.jsonl", "w") as file:
        for i in range(80):
            asked, *answers = rng.choice(WORDS, 3)
            pair = {"prompt": f"{asked} {i}?", "completion": " ".join(answers)}
            file.write(json.dumps(pair) + "\n")
    (folder / "tokenizer").mkdir()
    character_tokenizer("0123456789+=#;,", "<end>").save(folder / "tokenizer")
    for kind in ("pairs", "verdicts"):
        (folder / kind).mkdir()
        with open(folder / kind / "a.jsonl", "w") as file:
            for i in range(80):
                asked, *words, short = rng.choice(WORDS, 5)
                answers = {"chosen": " ".join(words), "rejected": short}
                if kind == "verdicts":
                    answers = {"completion": answers["chosen"], "label": i % 3 > 0}
                file.write(json.dumps({"prompt": f"{asked} {i}?"} | answers) + "\n")
    runs = {place: tmp_path_factory.mktemp("straight") / "run" for place in COMPARED.values()}
    names = ("text", "chats", "pairs", "verdicts", "tokenizer", "cache")
    return {name: folder / name for name in names} | runs


@pytest.fixture(scope="session")
def straight(tmp_path_factory, places):
    """Loop -> (run directory, last state) of an undisturbed run, made when first asked for."""
    made: dict[str, tuple] = {}

    def of(case: Case):
        if case.loop not in made:
            place = COMPARED.get(case.loop)
            folder = places[place].parent if place else tmp_path_factory.mktemp("straight")
            if case.compared:
                of(next(c for c in CASES if c.loop == case.compared))
            state = run_loop(case.loop, case.write(folder, **places))
            made[case.loop] = (folder / "run", state)
        return made[case.loop]

    return of


def left_by_death(run: Path, copy: Path, saved: int) -> None:
    """A copy of a run without the checkpoints after step ``saved``."""
    shutil.copytree(run, copy)
    for step in committed_steps(copy / "checkpoints"):
        if step > saved:
            shutil.rmtree(copy / "checkpoints" / step_name(step))


def test_every_loop_of_the_table_is_here():
    assert {case.loop for case in CASES} == {*LOOPS, EXAMPLE}


@loops("pretrain", "rl", "diffusion")
def test_a_resumed_run_ends_in_the_same_bits(case, straight, places, tmp_path):
    """From what an undisturbed run had saved by step 2, which is what a death after step 3 leaves.

    Runs that really die are in test_pretrain.py, test_rl_loop.py and test_video_rl.py.
    """
    run, state = straight(case)
    left_by_death(run, tmp_path / "run", saved=2)
    again = run_loop(case.loop, case.write(tmp_path, **places))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert steps(tmp_path / "run") == steps(run)
    assert [r["step"] for r in steps(run)] == [1, 2, 3, 4, 5, 6]


@loops("rl")
def test_a_branch_goes_on_from_the_whole_state_of_another_run(case, straight, places, tmp_path):
    run, state = straight(case)
    branch = case.write(tmp_path, **places)
    again = run_loop(case.loop, branch, "--run.branch-from", f"{run}@4")
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert steps(tmp_path / "run") == steps(run)[4:]
    assert load_artifact(str(tmp_path / "run"), ONE).meta["artifact"]["origin"] == f"all of {run}@4"


@loops("pretrain")
def test_a_mesh_changes_nothing(case, straight, places, tmp_path):
    run, _ = straight(case)
    mesh = ["--parallel.data", "2", "--parallel.fsdp", "2", "--parallel.tensor", "2"]
    run_loop(case.loop, case.write(tmp_path, **places), *mesh, devices=8)
    for got, want in zip(steps(tmp_path / "run"), steps(run), strict=True):
        for side in ("chosen", "rejected"):  # differences of sums, each with its own last bits
            if (name := f"log_ratio_{side}") in want:
                bit = float(np.spacing(np.float32(abs(want[f"logprob_{side}"]))))
                assert got.pop(name) == pytest.approx(want.pop(name), abs=4 * bit)
        assert (got.pop("slots_busy", 0) > 0) == (want.pop("slots_busy", 0) > 0)  # of how many
        assert got == pytest.approx(want, rel=2e-5, abs=1e-6)


UNFIT = [
    (["--parallel.tensor", "3", "--parallel.fsdp", "1"], "does not match the 8 devices"),
    (["--optimizer.learning-rate", "-1"], "learning_rate is -1"),
    (["--run.checkpoint.every-steps", "0"], "every_steps"),
    (["--init-from.artifact", "nowhere"], "nowhere does not exist"),
    (["--loop", "other"], "other"),  # a loop in a file may call itself anything
]


@pytest.mark.parametrize(
    ("case", "flags", "message"),
    [
        pytest.param(case, flags, message, id=f"{Path(case.loop).stem}-{flags[0]}")
        for case in CASES
        for flags, message in UNFIT
        if flags[0] != "--loop" or case.loop in LOOPS
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    case, flags, message, places, tmp_path, capsys
):
    start = "" if "--init-from.artifact" not in flags else "init_from: {{part: null}}\n"
    code = main([case.loop, case.write(tmp_path, start, **places), *flags])
    assert code == ExitCode.CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@loops("pretrain", "rl", "diffusion")
def test_its_artifact_holds_the_model_as_it_was(case, straight):
    run, state = straight(case)
    artifact = load_artifact(str(run), ONE)
    artifact.require(case.kind, "a test")
    learner = state.learners[artifact.meta["artifact"]["order"][0]]
    best = learner.params if learner.average is None else learner.average
    jax.tree.map(np.testing.assert_array_equal, artifact.params, best)
    assert artifact.step == 6 and artifact.meta["artifact"]["loop"] == case.loop
    assert load_artifact(f"{run}@4", ONE).step == 4
    with pytest.raises(CheckpointError, match="has no step 5; there are"):
        load_artifact(f"{run}@5", ONE)
    with pytest.raises(CheckpointError, match="has no part 'critic'; there are"):
        load_artifact(str(run), ONE, "critic")


@loops("rl")  # pretraining: tests/planning/test_plan.py
def test_it_is_planned(case, places, tmp_path, capsys):
    path = case.write(tmp_path, **places)
    topology = ["--topology", "cpu:1", "--output", str(tmp_path / "plans")]
    assert main(["plan", path, *topology]) == 0
    assert "operations" in capsys.readouterr().out
    (saved,) = (tmp_path / "plans").glob("*.json")
    plan = json.loads(saved.read_text())
    assert plan["memory_compiler"] > 0 and plan["flops"] > 0 and plan["parameters"] > 0


@pytest.mark.parametrize(
    ("case", "source"),
    [
        pytest.param(
            case,
            source,
            id=f"{Path(case.loop).stem}-from_{Path(source.loop).stem}",
            marks=pytest.mark.slow
            if source.loop != "pretrain"
            else {"sft": (), "diffusion": (), "rl": pytest.mark.thorough}.get(
                case.loop, pytest.mark.slow
            ),
        )
        for case in CASES
        for source in CASES
    ],
)
def test_every_result_can_be_given_to_every_loop_of_its_kind(
    case, source, straight, places, tmp_path, capsys
):
    run, _ = straight(source)
    start = f"init_from: {{{{artifact: {run}}}}}\n"
    recipe = case.write(tmp_path, start, **places)
    converted = case.kind is RewardModel and source.kind is Decoder
    if source.kind is not case.kind and not converted:
        assert main([case.loop, recipe]) == ExitCode.FAILURE
        assert f"a model of kind {source.kind.kind}" in capsys.readouterr().err
        return
    if source.loop in ("rl", EXAMPLE) and case.loop == "preference":
        assert main([case.loop, recipe]) == ExitCode.CONFIG  # the recipe names a tokenizer
        assert "the tokenizer has 300 pieces" in capsys.readouterr().err
        return
    if source.loop == EXAMPLE and case.loop != EXAMPLE:  # its model reads no text
        assert main([case.loop, recipe]) == ExitCode.FAILURE
        assert "has no tokenizer" in capsys.readouterr().err
        return
    if source.loop == "rl" and case.loop in ("pretrain", "sft", "reward"):
        assert main([case.loop, recipe]) == ExitCode.FAILURE  # a few characters are no text
        assert "has no" in capsys.readouterr().err
        return
    trained = load_artifact(str(run), ONE)
    trained = as_reward_model(trained) if converted else trained
    chat = case.loop == "rl" and source.loop in ("sft", "preference")  # whose prompts are longer
    longer = ["--rollout.max-prompt-tokens", "32"] if chat else []
    run_loop(case.loop, recipe, f"--{case.steps}", "1", *longer)
    norm = np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(trained.params)))
    first = steps(tmp_path / "run")[0]
    (found, *_) = [value for name, value in first.items() if name.startswith("param_norm")]
    assert found == pytest.approx(norm, rel=1e-6)
    mine = load_artifact(str(tmp_path / "run"), ONE)
    assert mine.meta["artifact"]["origin"] == f"{run}, step 6"
    assert mine.model == trained.model


@loops("sft")
def test_what_is_frozen_stays_and_needs_no_moments(case, straight, places, tmp_path):
    run, _ = straight(case)
    patterns = {Decoder: "groups", RewardModel: "decoder/groups", VideoVAE: "encoder"}
    pattern = patterns.get(case.kind, "blocks")
    start = f"init_from: {{{{artifact: {run}, freeze: [{pattern}]}}}}\n"
    run_loop(case.loop, case.write(tmp_path, start, **places), f"--{case.steps}", "2")
    before, after = (load_artifact(str(p), ONE).params for p in (run, tmp_path / "run"))
    frozen = attrgetter(pattern.replace("/", "."))
    jax.tree.map(np.testing.assert_array_equal, frozen(before), frozen(after))
    changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert any(changed)
    saved = Checkpointer(tmp_path / "run" / "checkpoints")._info(2)["leaves"]
    pattern = pattern.replace("/", ".")
    assert not [name for name in saved if "opt_state" in name and f".{pattern}." in name]
