"""Ablations: equal parameters, exact caches, pairing by seed, and runs that are made once."""

import hashlib
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from step_jax import PretrainConfig, equal_parameter_heads
from step_jax.cli import main as cli
from step_jax.core.command_line import load_config
from step_jax.core.config import load_file
from step_jax.core.errors import ConfigError
from step_jax.core.spec import count
from step_jax.models.context import Execution
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.metrics_log import read_metrics
from step_jax.runs.plots import plot_groups
from step_jax.trainers import ablation, variants
from step_jax.trainers.ablation import collect, load_variants, run_ablation
from step_jax.trainers.ablation_table import Ablation, Row, Times, Tried, difference
from step_jax.trainers.ablation_times import decoding_turn, filled_cache, in_turns, measure
from step_jax.trainers.variants import Values
from step_jax.training.step import DivergedError
from tests.models import small
from tests.trainers.loops import on_devices

ATTENTION = Path(__file__).parents[2] / "configs" / "ablations" / "attention"
WIDE = ATTENTION.with_name("attention_wide")


def attention(config):
    (group,) = config.model.layers
    (block,) = group.blocks
    return block.attention


# --- the attention ablation as it is configured ---------------------------------------------------


@pytest.fixture(scope="module")
def configured():
    return collect([ATTENTION], seeds=(), reference="mha")


def test_variants_are_those_of_the_paper(configured):
    kinds = {"mha", "mfa", "mfa_kr", "key_reuse", "mla"}
    inits = {"mha_paper_init", "mfa_paper_init", "mla_paper_init"}
    assert {row.name for row in configured.rows} == kinds | inits == set(configured.published)


@pytest.mark.parametrize("folder", [ATTENTION, WIDE], ids=lambda f: f.name)
def test_parameters_agree(folder):
    """Attention within 2 %, whole models within 1 %."""
    variants = {n: tried[None] for n, tried in load_variants([folder]).variants.items()}
    configured = collect([folder], seeds=(), reference="mha")
    mha, width = attention(variants["mha"]), variants["mha"].model.width
    target = count(mha.specs(width, FanIn()))
    for row in configured.rows:
        kind = attention(variants[row.name])
        assert kind.heads == equal_parameter_heads(kind, width, like=mha)
        assert abs(count(kind.specs(width, FanIn())) / target - 1) < 0.02
        assert abs(row.parameters / configured.reference.parameters - 1) < 0.01


def test_the_wide_variants_have_the_papers_proportions():
    """Width 8C, multi-head attention of heads of width C/2."""
    variants = {name: tried[None] for name, tried in load_variants([WIDE]).variants.items()}
    kinds = {name: attention(config) for name, config in variants.items()}
    C = kinds["mfa"].head_dim
    assert (variants["mfa"].model.width, C, kinds["mha"].head_dim) == (256, 32, C // 2)
    assert {kinds[n].head_dim for n in ("mqa", "mfa_kr", "key_reuse", "mfa_slow_output")} == {C}
    adamw = {name for name, config in variants.items() if config.optimizer.kind == "adamw"}
    assert adamw == {"mha_adamw", "mfa_adamw"}


def test_live_cache_against_mha(configured):
    heads = {row.name: row.heads for row in configured.rows}
    size = {row.name: row.cache_bytes for row in configured.rows}
    assert (heads["mha"], heads["mfa"]) == ((8,), (26,))
    assert size["mha"] == 2 * 2 * 2 * 128  # layers, key and value, bytes, width
    assert size["mfa"] / size["mha"] - 1 == -0.875
    assert size["mfa_kr"] / size["mha"] - 1 == size["key_reuse"] / size["mha"] - 1 == -0.9375
    assert size["mfa"] / size["mla"] == 256 / 576  # the paper's 512 beside 1152


# --- statistics and the table ---------------------------------------------------------------------


def row(name, *nll, cache_bytes=64.0):
    return Row(name, 1000, (4,), cache_bytes, dict(enumerate(nll)), {})


def test_difference_is_paired_by_seed():
    """Seeds move both by far more than they differ."""
    low, high = row("low", 2.0, 2.5, 3.0), row("high", 2.1, 2.62, 3.11)
    gap = difference(high, low)
    assert gap.mean == pytest.approx(0.11) and gap.certain
    assert gap.half == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert str(gap) == "+0.1100 [+0.0852, +0.1348] *"
    assert not difference(row("noisy", 2.1, 2.4, 3.3), low).certain
    single = difference(row("one", 2.1), low)
    assert str(single) == "+0.1000" and not single.certain
    assert difference(row("none"), low) is None


def test_student_t_is_used_for_few_seeds():
    """2.2 standard errors: certain for many seeds, not for three."""
    zero = row("zero", *[0.0] * 30)
    for seeds, certain in ((3, False), (30, True)):
        values = [1.0, -1.0] * (seeds // 2) + [0.0] * (seeds % 2)
        error = statistics.stdev(values) / seeds**0.5
        assert difference(row("x", *[v + 2.2 * error for v in values]), zero).certain is certain


def test_orders_say_what_is_noise():
    a, b, c = row("a", 1.0, 1.0), row("b", 2.0, 2.001), row("c", 1.5, 3.0)
    result = Ablation((c, b, a), a, 100, {"a": 3.0, "b": 1.0, "c": 4.0}, "somewhere")
    text = result.orders()
    assert "ours: a < b ~ c" in text
    assert "published: b < a < c (somewhere)" in text
    # a and b differ for certain, and against the published figures; c's seeds are far apart
    assert "0 certain here in the same direction, 1 certain in the other, 2 within" in text


def test_published_ties_are_ties():
    rows = (row("a", 1.0), row("b", 2.0), row("c", 3.0))
    text = Ablation(rows, rows[0], 100, {"a": 2.0, "b": 2.0, "c": 5.0}).orders()
    assert "published: a = b < c" in text
    assert "0 certain here in the same direction, 0 certain in the other, 2 within" in text


def test_a_best_value_at_the_border_is_said():
    losses = {"1e-3": 3.0, "3e-3": 2.0, "1e-2": 2.5}
    inner = replace(row("inner", 2.0), tried=Tried("rate", losses, "3e-3", False))
    outer = replace(row("outer", 2.1), tried=Tried("rate", losses | {"1e-2": 1.5}, "1e-2", True))
    text = Ablation((inner, outer), inner, 100, {}).markdown()
    assert "| rate | 1e-3 | 3e-3 | 1e-2 |" in text
    assert "| inner | 3.0000 | **2.0000** | 2.5000 |" in text
    assert "The best rate of outer, 1e-2, lies at the border of what was tried" in text
    assert "The best rate of inner" not in text


def test_probes_and_times_stand_in_tables_of_their_own():
    looks = {"previous_token/0": 0.9, "induction/1": 0.25}
    times = Times(0.5, {128: 2e-3})
    first = {"previous_token": 1280.0, "induction": math.inf}
    looking = replace(row("a", 1.0), looks=looks, looks_from=first, times=times)
    text = Ablation((looking,), looking, 1, {}).markdown()
    assert "| score/layer | previous_token/0 | induction/1 | previous_token above 0.3 from" in text
    assert "| a | 0.900 | 0.250 | 1,280 | - |" in text
    assert "| time | training step, s | token with 128 cached, ms |" in text
    assert "| a | 0.5 | 2 |" in text


def test_turns_are_interleaved_and_the_first_round_is_not_counted():
    clock, calls = [0.0], []

    def turn(name, seconds):
        def act():
            calls.append(name)
            clock[0] += next(seconds)

        return act

    turns = {"a": turn("a", iter([9, 1, 2, 3])), "b": turn("b", iter([9, 5, 5, 5]))}
    spent = in_turns(turns, 3, lambda: clock[0])
    assert calls == ["a", "b"] * 4 and spent == {"a": 2, "b": 5}


def test_table_without_runs():
    empty = Ablation((row("a"), row("b", cache_bytes=8.0)), row("a"), 100, {})
    assert "| b | 1,000 | 4 | - | - | - | 8 | -87.5 % |" in empty.markdown()
    assert "No run is finished." in empty.markdown()


def test_picture_needs_a_curve(tmp_path):
    with pytest.raises(ValueError, match="none of the runs"):
        plot_groups({"a": [tmp_path]}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# --- running --------------------------------------------------------------------------------------

TINY = """\
run: {{directory: {runs}, logging: {{sinks: []}}}}
model:
  width: 16
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mha, heads: 2, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 16}}
training: {{steps: 3, batch_size: 8}}
data:
  path: {text}
  cache_dir: {cache}
  vocab_size: 300
  sequence_length: 16
  heldout_fraction: 0.3
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant, warmup_steps: 0}}}}
execution: {{dtype: float32}}
evaluation: {{every_steps: 0}}
sample: {{tokens: 0}}
parallel: {{data: -1, fsdp: 1}}
"""


def hash_word(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:7]


@pytest.fixture
def recipes(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        words = [f"{hash_word(i * k)} is {hash_word(k)}" for k in range(60)]
        (text / f"{i}.txt").write_text(f"text {i}: " + ", ".join(words))
    directory = tmp_path / "recipes"
    directory.mkdir()
    base = TINY.format(runs=tmp_path / "runs", text=text, cache=tmp_path / "cache")
    (directory / "base.yaml").write_text(base)
    (directory / "mha.yaml").write_text("base: base.yaml\n")
    layers = "[{repeat: 1, blocks: [{attention: {kind: mfa, heads: 3, head_dim: 2}, "
    layers += "mlp: {kind: swiglu, hidden: 16}}]}]"
    (directory / "mfa.yaml").write_text(f"base: base.yaml\nmodel: {{layers: {layers}}}\n")
    return directory


@pytest.fixture
def one_device():
    with on_devices(1):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_trains_what_is_missing(recipes, tmp_path, capsys, monkeypatch):
    runs, started = tmp_path / "runs", []

    def counted(config, train=variants.pretrain.run):
        started.append(Path(config.run.directory).relative_to(runs).as_posix())
        return train(config)

    monkeypatch.setattr(variants.pretrain, "run", counted)
    argv = ["ablate", str(recipes), "--seeds", "1", "--reference", "mha", "--rounds", "0"]
    assert cli.main(argv) == 0
    assert started == ["mfa/seed_0", "mha/seed_0"]
    out, table = capsys.readouterr().out, (runs / "ablation.md").read_text()
    assert f"table:   {runs / 'ablation.md'}\npicture: {runs / 'ablation.png'}" in out
    assert table in out and "-87.5 %" in table and "384 tokens a run" in table
    assert (runs / "ablation.png").read_bytes().startswith(b"\x89PNG")
    result = collect([recipes], (0, 1))
    mfa = result.rows[0]
    evaluations = [r for r in read_metrics(runs / "mfa" / "seed_0") if r["event"] == "eval"]
    assert mfa.nll == {0: evaluations[-1]["nll"]} != result.rows[1].nll
    saved = load_file(PretrainConfig, runs / "mfa" / "seed_0" / "config.yaml")
    assert mfa.parameters == count(saved.model.specs())

    forget_the_end(runs / "mfa" / "seed_0" / "metrics.jsonl")
    assert collect([recipes], (0, 1)).rows[0].nll == {}
    again = run_ablation([recipes / "mfa.yaml"], (0, 1)).rows[0]
    assert started[2:] == ["mfa/seed_0", "mfa/seed_1"]
    assert again.nll[0] == mfa.nll[0] != again.nll[1]

    assert cli.main(argv) == 0 and len(started) == 4
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        run_ablation([recipes], (0,), ["--optimizer.learning_rate", "2e-2"])
    longer = collect([recipes], (0,), ["--training.steps", "4"])
    assert longer.tokens == 512 and longer.rows[0].nll == {}  # not finished: it can go on


def forget_the_end(metrics: Path) -> None:
    """As if the run had been killed while it scored the held-out text."""
    lines = metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["event"] not in ("summary", "eval")]
    metrics.write_text("".join(kept))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ("training: {steps: 4}", "odd differ in their tokens.*: 384 and 512"),
        ("data: {vocab_size: 310}", "their tokenizer.*: one of 300 pieces .* and one of 310"),
        ("data: {tokenizer: some.model}", "their tokenizer.*: one of 300 .* and some.model"),
        ("data: {heldout_fraction: 0.2}", "their held-out documents.*: 0.3 of .* and 0.2 of"),
        ("data: {path: elsewhere}", "their held-out documents.* and 0.3 of elsewhere"),
    ],
)
def test_losses_that_would_not_compare_are_refused(change, message, recipes):
    (recipes / "odd.yaml").write_text(f"base: base.yaml\n{change}\n")
    with pytest.raises(ConfigError, match=message):
        load_variants([recipes])


def test_other_weights_train_another_tokenizer(recipes):
    for name, weight in (("even", 1), ("uneven", 3)):
        sources = f"[{{path: a}}, {{path: b, weight: {weight}}}]"
        (recipes / f"{name}.yaml").write_text(
            f"base: base.yaml\ndata: {{path: null, sources: {sources}}}\n"
        )
    with pytest.raises(ConfigError, match=r"tokenizer.*\[1.0, 1.0\] and .*\[1.0, 3.0\]"):
        load_variants([recipes / "even.yaml", recipes / "uneven.yaml"])


def test_variants_may_differ_in_any_other_part(recipes):
    (recipes / "odd.yaml").write_text(
        "base: base.yaml\n"
        "training: {steps: 6, batch_size: 4}\n"
        "data: {packing: fit}\n"
        "optimizer: {kind: muon, schedule: {kind: constant, warmup_steps: 1}}\n"
    )
    (tried,) = load_variants([recipes], search=None).variants["odd"].values()
    assert tried.optimizer.kind == "muon" and tried.data.packing == "fit"


def test_a_search_loads_a_variant_for_each_value(recipes):
    search = Values.parse("optimizer.learning-rate=1e-2,3e-3", "--search")
    assert search == Values("optimizer.learning_rate", ("3e-3", "1e-2"))
    plan = load_variants([recipes], search=search)
    rates = {v: c.optimizer.learning_rate for v, c in plan.variants["mha"].items()}
    assert rates == {"3e-3": 3e-3, "1e-2": 1e-2}
    directory = plan.of_seed("mha", "3e-3", 1).run.directory
    assert directory.endswith("runs/mha/learning_rate_3e-3/seed_1")
    with pytest.raises(ConfigError, match=r"\(training.steps 3\) .* differ in their tokens"):
        load_variants([recipes], search=Values.parse("training.steps=3,4", "--search"))


def losses_of(monkeypatch, loss):
    """Finished runs whose loss is ``loss(variant, rate, seed)``; returns the trained ones."""
    known, trained = {}, []

    def train(config):
        variant, seed = Path(config.run.directory).parts[-3], config.run.seed
        rate = config.optimizer.learning_rate
        trained.append((variant, rate, seed))
        known[config.run.directory] = loss(variant, rate, seed)
        return {"nll": known[config.run.directory]}

    monkeypatch.setattr(variants.pretrain, "run", train)
    monkeypatch.setattr(variants, "finished", lambda config: known.get(config.run.directory))
    monkeypatch.setattr(ablation, "_looks", lambda run: ({}, {}))
    monkeypatch.setattr(Ablation, "plot", lambda self, out: out)
    return trained


def test_each_variant_gets_the_best_of_its_own_values(recipes, tmp_path, monkeypatch):
    best = {"mfa": 3e-3, "mha": 1e-2}
    trained = losses_of(monkeypatch, lambda name, rate, seed: abs(rate - best[name]) + seed)
    search = Values.parse("optimizer.learning_rate=1e-3,3e-3,1e-2", "--search")
    (tmp_path / "runs").mkdir()
    result = run_ablation([recipes], (0, 1), search=search, say=lambda line: None)
    assert len(trained) == 2 * 3 + 2  # seed 0 of the best is there already
    assert trained[-2:] == [("mfa", 3e-3, 1), ("mha", 1e-2, 1)]
    mfa, mha = result.rows
    assert (mfa.tried.best, mfa.tried.border) == ("3e-3", False)
    assert (mha.tried.best, mha.tried.border) == ("1e-2", True)
    assert mfa.nll == mha.nll == {0: 0.0, 1: 1.0}
    assert "The best optimizer.learning_rate of mha, 1e-2, lies at" in result.table.read_text()


def test_a_search_goes_on_without_a_value_that_diverges(recipes, tmp_path, monkeypatch):
    def loss(name, rate, seed):
        if rate > 0.1:
            directory = tmp_path / "runs" / name / "learning_rate_1" / "seed_0"
            directory.mkdir(parents=True)
            end = {"event": "end", "step": 2, "status": "failed", "reason": "DivergedError: no"}
            (directory / "metrics.jsonl").write_text(json.dumps(end))
            raise DivergedError("no")
        return rate

    trained = losses_of(monkeypatch, loss)
    search = Values.parse("optimizer.learning_rate=1e-3,1", "--search")
    (tmp_path / "runs").mkdir()
    for _ in range(2):  # what diverged is not tried again
        mfa, mha = run_ablation([recipes], (0,), search=search, say=lambda line: None).rows
        assert mfa.tried.losses == mha.tried.losses == {"1e-3": 1e-3, "1": math.inf}
        assert len(trained) == 4


def test_a_search_that_is_not_finished_chooses_nothing(recipes):
    search = Values.parse("optimizer.learning_rate=1e-3,3e-3", "--search")
    mfa, _ = collect([recipes], (0, 1), search=search).rows
    assert mfa.nll == {} and mfa.tried.best is None and not mfa.tried.border


def test_the_first_look_back_is_found_in_the_evaluations(recipes, tmp_path):
    run = load_variants([recipes]).of_seed("mha", None, 0)
    directory = Path(run.run.directory)
    directory.mkdir(parents=True)
    scores = [(1, 0.1, 0.0), (2, 0.4, 0.2), (3, 0.5, 0.2)]
    directory.joinpath("metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {"event": "eval", "name": "heldout", "step": step, "nll": 1.0}
                | {"previous_token/0": previous, "induction/1": induction}
            )
            + "\n"
            for step, previous, induction in scores
        )
    )
    final, first = ablation._looks(run)
    assert final == {"previous_token/0": 0.5, "induction/1": 0.2}
    assert first == {"previous_token": 2 * 8 * 16, "induction": math.inf}


def test_a_text_that_was_changed_between_runs_is_noticed(recipes, tmp_path, monkeypatch):
    losses_of(monkeypatch, lambda *of: 1.0)
    monkeypatch.setattr(variants, "finished", lambda config: 1.0)
    for name, checksum in (("mfa", "1"), ("mha", "2")):
        folder = tmp_path / "runs" / name / "seed_0" / "heldout"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"checksum": checksum}))
    with pytest.raises(ConfigError, match="mfa/seed_0 and .*mha/seed_0 were scored on unlike"):
        collect([recipes], (0,))


def test_a_token_is_decoded_again_and_again_into_the_same_slot():
    model = small.decoder("mfa", repeat=1)
    turn = decoding_turn(model, Execution(dtype="float32"), length=6)
    turn(), turn()
    cache = filled_cache(model, 6, jnp.bfloat16)
    assert cache.lengths_B.tolist() == [6] and cache.layers[0][0][0].shape == (1, 1, 7, 8)


@pytest.mark.slow
def test_a_step_and_a_token_of_a_variant_are_timed(recipes):
    config = load_variants([recipes / "mfa.yaml"]).variants["mfa"][None]
    times = measure({"mfa": config}, {"mfa": with_vocabulary(config.decoder, 300)}, rounds=1)
    assert times["mfa"].step > 0 and times["mfa"].token[16] > 0


def test_base_is_no_variant(recipes):
    assert list(load_variants([recipes]).variants) == ["mfa", "mha"]
    files = [recipes / "mha.yaml", recipes / "mfa.yaml"]
    assert list(load_variants(files).variants) == ["mha", "mfa"]


def test_two_variants_of_one_name(recipes):
    with pytest.raises(ConfigError, match="two variants are named mha"):
        load_variants([recipes, recipes / "mha.yaml"])


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a directory"),
        (["--seeds", "3"], "name a directory"),
        (["{empty}"], "no configuration"),
        (["{recipes}", "--seeds", "0"], "at least 1"),
        (["{recipes}", "--seeds", "x"], "--help"),
        (["{recipes}", "--rounds", "-1"], "0 or more"),
        (["{recipes}", "--search", "optimizer.learning_rate"], "write KEY=VALUE,VALUE"),
        (["{recipes}", "--search", "optimizer.learning_rate=1e-3"], "two or more values"),
        (["{recipes}", "--search", "optimizer.rate=1e-3,2e-3"], "unknown option --optimizer.rate"),
        (["{recipes}", "--reference", "gqa"], "no variant is named gqa; there are mfa, mha"),
        (["{recipes}", "--training.stepz", "3"], "did you mean"),
    ],
)
def test_bad_input(argv, message, recipes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"{empty}": str(tmp_path / "empty"), "{recipes}": str(recipes)}
    assert cli.main(["ablate", *(places.get(a, a) for a in argv)]) == 78
    assert message in capsys.readouterr().err


def test_the_mixture_uses_no_more_parameters_for_a_token_than_the_dense_model():
    def model(name: str):
        config = load_config(PretrainConfig, [f"configs/ablations/moe/{name}.yaml"]).config
        return with_vocabulary(config.model, config.data.vocab_size).specs()

    dense, mixture = model("dense"), model("moe")
    active = count(mixture, active=True)
    assert 0.995 * count(dense) < active <= count(dense) < 0.5 * count(mixture)
