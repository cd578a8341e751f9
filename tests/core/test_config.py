"""Typed configuration: conversion by declared type, precedence, messages, flags."""

import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from step_jax.core import config as config_lib
from step_jax.core.command_line import load_config
from step_jax.core.config import config_hash, load_file, parse_config, to_yaml
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.trainers import find_loop


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class MHA:
    kind: ClassVar[str] = "mha"
    heads: int = 8
    kv_heads: int | None = None

    def validate(self):
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")


@dataclass(frozen=True)
class MFA:
    kind: ClassVar[str] = "mfa"
    heads: int = 26
    key_reuse: bool = False


@dataclass(frozen=True)
class Block:
    attention: MHA | MFA = MHA()
    hidden: int = 4


@dataclass(frozen=True)
class Group:
    repeat: int
    blocks: tuple[Block, ...] = (Block(),)


@dataclass(frozen=True)
class Adam:
    """An optimizer.

    peak_lr: the highest rate,
      or a scaling law.
    fused: in one pass.
    """

    peak_lr: float | Literal["step_law"] = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = True


@dataclass(frozen=True)
class Config:
    """A configuration."""

    path: Path
    layers: tuple[Group, ...]
    optimizer: Adam = Adam(peak_lr=0.5)
    name: str = "run"
    note: str | None = None
    colour: Colour = Colour.RED
    remat: Literal["none", "full", 2] = "none"
    weights: dict[str, float] = field(default_factory=dict)
    ema: Adam | None = None


BASIC = """\
path: data
layers:
  - repeat: 2
    blocks:
      - attention: {kind: mfa, heads: 4}
      - hidden: 8
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="x.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        return name

    return write


def message(cls, argv):
    with pytest.raises(ConfigError) as caught:
        load_config(cls, argv)
    assert caught.value.exit_code == ExitCode.CONFIG == 78
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("optimizer: {peak_lr: 3e-4}", 3e-4),
        ("optimizer: {peak_lr: 1_000}", 1000.0),
        ("optimizer: {peak_lr: .5}", 0.5),
        ("optimizer: {peak_lr: -inf}", float("-inf")),
        ("optimizer: {peak_lr: step_law}", "step_law"),
        ("optimizer: {fused: no}", False),
        ("optimizer: {fused: on}", True),
        ("name: no", "no"),
        ("name: 12:30", "12:30"),
        ("name: 1e4", "1e4"),
        ("name: 2026-01-01", "2026-01-01"),
        ("name: 'null'", "null"),
        ("note: ~", None),
        ("note:", None),
        ("note: 'null'", "null"),
        ("remat: none", "none"),
        ("remat: 2", 2),
        ("colour: blue", Colour.BLUE),
        ("ema: {fused: false}", Adam(fused=False)),
        ("ema: null", None),
        ("weights: {a: 1, no: 2e1}", {"a": 1.0, "no": 20.0}),
    ],
)
def test_text_becomes_the_declared_type(line, value):
    config = parse_config(Config, BASIC + line)
    key = line.split(":")[0]
    found = getattr(config, key)
    if key == "optimizer":
        found = getattr(found, line.split("{")[1].split(":")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1e4", "10_000", "10000", "+10000", "1.0e4"])
def test_whole_numbers(text):
    assert parse_config(Group, f"repeat: {text}").repeat == 10000


@pytest.mark.parametrize("text", ["12:30", "1.5", "010", "'3'", "yes", "0x10", "", "1e400", "1__0"])
def test_not_whole_numbers(text):
    with pytest.raises(ConfigError, match="repeat: expected int, got"):
        parse_config(Group, f"repeat: {text}")


@pytest.mark.parametrize("text", ["nan", ".nan", "1:30", "'0.1'", ".", "e5", "++1", "true"])
def test_not_numbers(text):
    with pytest.raises(ConfigError, match="peak_lr: expected float"):
        parse_config(Adam, f"peak_lr: {text}")


def test_wrong_type_names_file_line_key_type_and_value(write):
    assert message(Config, [write(BASIC + "optimizer:\n  peak_lr: fast\n")]) == (
        "x.yaml:8: optimizer.peak_lr: expected float or 'step_law', got 'fast'"
    )


def test_unknown_key(write):
    assert message(Config, [write(BASIC + "optimizer:\n  peek_lr: 1\n")]) == (
        "x.yaml:8: unknown key 'optimizer.peek_lr'; did you mean 'peak_lr'?"
    )


def test_duplicate_key(write):
    assert message(Config, [write(BASIC + "path: twice\n")]) == (
        "x.yaml:7: duplicate key 'path' (first given at x.yaml:1)"
    )


def test_every_problem_is_reported_at_once(write):
    text = message(Config, [write("pat: 1\nname: [1]\nlayers: 3\n")])
    assert sorted(line.split(":")[1] for line in text.splitlines()) == ["1", "1", "2", "3"]
    assert "path: is required (Path)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: !!python/object/apply:os.system ['true']", "tags such as"),
        ("path: !include other", "tags such as"),
        ("path: &a x\nname: *a", "aliases are not supported"),
        ("path: [", "x.yaml:1"),
        ("[a, b]", "a configuration is a mapping"),
        ("a: 1\n---\nb: 2", "another document"),
        ("[a]: 1", "a key must be a word"),
        ("path: a\n\tname: b", "x.yaml:2"),
        ("path: \x00", "unprintable character"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_bad_yaml(write, text, expected):
    assert expected in message(Config, [write(text)])


def test_missing_file_suggests_a_neighbour(write):
    write(BASIC, "quickstart.yaml")
    assert message(Config, ["quikstart.yaml"]) == (
        "no such configuration file: quikstart.yaml; did you mean 'quickstart.yaml'?"
    )


def test_unions_by_kind(write):
    blocks = parse_config(Config, BASIC).layers[0].blocks
    assert blocks == (Block(MFA(heads=4)), Block(MHA(), hidden=8))
    wrong = BASIC.replace("kind: mfa", "kind: mfq")
    assert message(Config, [write(wrong)]) == (
        "x.yaml:5: layers.0.blocks.0.attention: unknown kind 'mfq', expected one of: mha, mfa; "
        "did you mean 'mfa'?"
    )
    # A key of the other kind is unknown, and a mapping without `kind` keeps the default's.
    other = BASIC.replace("heads: 4", "kv_heads: 4")
    assert "unknown key 'layers.0.blocks.0.attention.kv_heads'" in message(Config, [write(other)])
    assert parse_config(Block, "attention: {heads: 2}").attention == MHA(heads=2)


def test_partial_group_keeps_the_default_instance_of_the_field():
    config = parse_config(Config, BASIC + "optimizer: {fused: no}")
    assert config.optimizer == Adam(peak_lr=0.5, fused=False)


def test_precedence_and_origins(write):
    write("path: base\nname: base\nnote: base\noptimizer: {fused: no, peak_lr: 1}\n", "b/base.yaml")
    text = "base: b/base.yaml\n" + BASIC + "name: file\noptimizer: {peak_lr: 2}\n"
    loaded = load_config(Config, [write(text), "--optimizer.peak-lr", "3"])
    assert loaded.config.optimizer == Adam(peak_lr=3.0, fused=False)
    assert (loaded.config.path, loaded.config.name, loaded.config.note) == (
        Path("data"),
        "file",
        "base",
    )
    origins = {k: loaded.origins[k] for k in ("path", "name", "note", "colour")}
    assert origins == {
        "path": "x.yaml:2",
        "name": "x.yaml:8",
        "note": "b/base.yaml:3",
        "colour": "default",
    }
    assert loaded.origins["optimizer.peak_lr"] == "command line"
    assert loaded.origins["optimizer.betas"] == "default"
    table = {line.split(" = ")[0]: line for line in loaded.explain().splitlines()}
    assert table["optimizer.fused"].split() == ["optimizer.fused", "=", "false", "b/base.yaml:4"]


def test_base_replaces_lists_and_groups_of_another_kind(write):
    write("attention: {kind: mha, kv_heads: 2}\nhidden: 3\n", "base.yaml")
    config = load_config(
        Block, [write("base: base.yaml\nattention: {kind: mfa, heads: 2}\n")]
    ).config
    assert config == Block(MFA(heads=2), hidden=3)
    write(BASIC, "base.yaml")
    config = load_config(Config, [write("base: base.yaml\nlayers: [{repeat: 7}]\n")]).config
    assert config.layers == (Group(7),)


def test_base_cycle(write):
    write("base: x.yaml\n", "y.yaml")
    assert "circle: x.yaml -> y.yaml -> x.yaml" in message(Config, [write("base: y.yaml\n")])


def test_flags_reach_everything(write):
    argv = [write(BASIC), "--layers.0.repeat", "4", "--layers.0.blocks.0.attention.key-reuse"]
    argv += [
        "--layers.0.blocks.1.attention.kind",
        "mfa",
        "--layers.0.blocks.1.attention.heads",
        "3",
    ]
    argv += ["--optimizer.betas", "0", "1e-1", "--optimizer.no-fused", "--weights.my-data", "2"]
    argv += ["--optimizer.peak_lr=-1", "--colour", "blue", "--ema", "{fused: no}", "--note", "null"]
    config = load_config(Config, argv).config
    assert config.layers == (Group(4, (Block(MFA(4, True)), Block(MFA(3), 8))),)
    assert config.optimizer == Adam(-1.0, (0.0, 0.1), False)
    assert config.weights == {"my-data": 2.0}
    assert (config.colour, config.ema, config.note) == (Colour.BLUE, Adam(fused=False), None)


def test_an_empty_word_is_an_empty_text_and_null_where_that_is_a_value(write):
    loaded = load_config(Config, [write(BASIC), "--name", "", "--note", ""])
    assert (loaded.config.name, loaded.config.note) == ("", None)
    assert "got nothing" in message(Config, [write(BASIC), "--optimizer.peak-lr", ""])


def test_flags_change_items_of_a_default_list():
    argv = ["--repeat", "1", "--blocks.0.hidden", "9"]
    assert load_config(Group, argv).config == Group(1, (Block(hidden=9),))
    assert "valid items are 0 to 0" in message(Group, ["--repeat", "1", "--blocks.1.hidden", "9"])


@dataclass(frozen=True)
class Listed:
    prompt: tuple[str, ...] = ("",)
    betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prompt", "A", "--prompt", "B"], Listed(("A", "B"))),
        (
            ["--prompt=A", "--seed=1", "--prompt", "B", "C", "--seed=2"],
            Listed(("A", "B", "C"), seed=2),
        ),
        (["--prompt", "['A']", "--prompt", "B"], Listed(("A", "B"))),
        (["--prompt", "A", "--prompt", "[]"], Listed(())),
        (["--betas", "0", "0.1", "--betas", "0.2", "0.3"], Listed(betas=(0.2, 0.3))),
    ],
)
def test_a_list_that_is_given_in_several_flags_is_all_of_them(argv, expected):
    assert load_config(Listed, argv).config == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optimizer.peek-lr", "1"], "unknown option --optimizer.peek-lr; did you mean "),
        (["--peak-lr", "1"], "did you mean '--ema.peak-lr'?"),
        (["--name"], "--name needs a value"),
        (["--name", "a", "b"], "takes one value; what is 'b'?"),
        (["-n", "a"], "unknown option -n"),
        (["--optimizer.peak-lr", "x"], "command line: optimizer.peak_lr: expected float"),
        (["--optimizer.betas", "1"], "expected 2 items, got 1"),
        (["--path", "x"], "layers: is required"),
        (["--name.x", "1"], "unknown option --name.x"),
    ],
)
def test_bad_flags(argv, expected):
    assert expected in message(Config, argv)


def test_validate_names_the_place(write):
    text = BASIC.replace("- hidden: 8", "- attention:\n          kv_heads: 3")
    assert message(Config, [write(text)]) == (
        "x.yaml:7: layers.0.blocks.1.attention: heads=8 is no multiple of kv_heads=3"
    )


def test_explain_prints_before_it_validates(write, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(Config, [write(BASIC), "--explain"])
    assert caught.value.code == 0
    assert "layers.0.blocks.0.attention.heads = 4" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        load_config(Block, ["--attention.kv-heads", "3", "--explain"])
    assert "attention.kv_heads = 3" in capsys.readouterr().out


def test_help_shows_the_values_of_the_file(write, capsys):
    for argv in ([write(BASIC), "--help"], ["--help"]):  # with and without the required keys
        with pytest.raises(SystemExit) as caught:
            load_config(Config, argv, prog="step-jax test")
        assert caught.value.code == 0
        page = capsys.readouterr().out
        assert "--optimizer.peak-lr" in page and "step-jax test" in page
        assert "the highest rate, or a scaling law. (default: 0.5)" in page


def test_hash_is_of_values_not_of_spelling(write):
    one = parse_config(Adam, "peak_lr: 1e-3\nfused: yes")
    two = parse_config(Adam, "fused: true\npeak_lr: 0.001\nbetas: [0.9, 0.95]")
    assert config_hash(one) == config_hash(two) != config_hash(Adam(peak_lr=2e-3))
    assert config_hash(Block(MHA(heads=2))) != config_hash(Block(MFA(heads=2)))


def test_resolved_yaml_loads_back(write):
    loaded = load_config(Config, [write(BASIC), "--name", "none", "--weights.a", "1"])
    assert load_file(Config, write(loaded.yaml_text, "resolved.yaml")) == loaded.config
    assert to_yaml(loaded.config) == loaded.yaml_text


def test_reading_configuration_imports_no_jax():
    code = (
        "import sys, step_jax.cli.main, step_jax.core.config, step_jax.core.command_line\n"
        "bad = {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsupported_value_is_refused():
    with pytest.raises(TypeError, match="set is not a configuration type"):
        config_lib.to_plain({"a": {1}})


# --- Alternatives, values from Python, text that is none ------------------------------------------


@dataclass(frozen=True)
class Data:
    alternatives: ClassVar = {"path": ("field",), "sources": ("stages",)}
    path: str | None = None
    field: str = "text"
    sources: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()

    def validate(self):
        if self.path and self.sources:
            raise ValueError("path and sources are both set")


@dataclass(frozen=True)
class Run:
    data: Data = Data(path="default", field="words")
    steps: int = 1
    rate: float | None = 0.5
    tied: bool = False
    pair: tuple[float, float] = (0.0, 0.0)


def test_of_alternatives_the_upper_layer_counts(write):
    write("data: {path: below, field: body}\n", "path.yaml")
    write("base: path.yaml\ndata: {sources: [a, b]}\n", "mixture.yaml")
    write("base: mixture.yaml\ndata: {stages: [1, 2]}\n", "staged.yaml")
    write("base: staged.yaml\ndata: {path: above}\n", "top.yaml")

    def data(*argv):
        return load_config(Run, argv).config.data

    assert data("path.yaml") == Data(path="below", field="body")
    assert data("mixture.yaml") == Data(sources=("a", "b"))
    assert data("staged.yaml") == Data(sources=("a", "b"), stages=(1, 2))
    assert data("top.yaml") == Data(path="above")  # `field` went with the path it belonged to
    assert data("mixture.yaml", "path.yaml") == Data(path="below", field="body")
    assert data("staged.yaml", "--data.path", "flag") == Data(path="flag")
    assert data("top.yaml", "--data.sources", "c") == Data(sources=("c",))
    assert data("path.yaml", "--data.field", "x") == Data(path="below", field="x")
    assert data("staged.yaml", "--data.sources", "[]") == Data(
        path="below", field="body", stages=(1, 2)
    )
    assert data(write("data: {sources: [a]}\n")) == Data(sources=("a",))  # over the default's path
    loaded = load_config(Run, ["mixture.yaml"])
    assert loaded.origins["data.path"] == loaded.origins["data.field"] == "default"
    assert parse_config(Run, loaded.yaml_text) == loaded.config


@pytest.mark.parametrize(
    "argv", [["x.yaml"], ["--data.path", "a", "--data.sources", "b"], ["y.yaml"]]
)
def test_alternatives_of_one_layer_are_for_validate_to_refuse(write, argv):
    write("data: {path: a, sources: [b]}\n")
    write("base: x.yaml\nsteps: 2\n", "y.yaml")
    assert "both set" in message(Run, argv)


def test_a_mixture_stands_over_a_base_with_a_path_in_the_real_schema(write):
    from step_jax.data import DataConfig

    write("path: ~/texts\ntext_field: body\nvocab_size: 500\n", "base.yaml")
    write("base: base.yaml\nsources: [{path: a, weight: 2}, {path: b}]\n", "mixture.yaml")
    config = load_config(DataConfig, ["mixture.yaml"]).config
    assert [s.path for s in config.resolved_sources] == ["a", "b"] and config.vocab_size == 500
    stages = "[{weights: [1, 0], until_step: 5}, {weights: [0, 1]}]"
    argv = ["mixture.yaml", "--stages", stages, "--path", "c"]
    assert "stages[0].weights has 2 entries for 1" in message(DataConfig, argv)


def test_values_may_be_python_s_own(write):
    import numpy as np

    write("steps: 3\n")
    argv = [Path("x.yaml"), "--steps", 50, "--rate", None, "--tied", True, "--pair", [1, 2e-5]]
    assert load_config(Run, argv).config == Run(steps=50, rate=None, tied=True, pair=(1.0, 2e-5))
    argv = ["--steps", np.int64(7), "--rate", np.float32(0.25), "--data.path", Path("a b")]
    assert load_config(Run, argv).config == Run(Data(path="a b", field="words"), 7, 0.25)
    argv = ["--rate", -1e-30, "--pair", (np.float64(0.1), -3), "--data.sources", ["é", "no"]]
    config = load_config(Run, argv).config
    assert (config.rate, config.pair, config.data.sources) == (-1e-30, (0.1, -3.0), ("é", "no"))
    argv = ["--data", {"path": "x", "stages": [4]}]
    assert load_config(Run, argv).config.data == Data(path="x", field="words", stages=(4,))
    assert "steps: expected int, got '1.5'" in message(Run, ["--steps", 1.5])
    assert "rate: expected float" in message(Run, ["--rate", float("nan")])
    for value in ({1}, object(), [object()], b"x"):
        assert "an option takes text, a number" in message(Run, ["--steps", value])


def test_text_that_is_not_unicode_is_refused(write):
    shown = "command line: 'caf\\\\xe9' is not UTF-8 text"
    assert message(Run, ["--data.path", "caf\udce9"]).startswith(shown)
    assert message(Run, [write('data: {path: "\\ud800"}\n')]).startswith("x.yaml:1: ")


@pytest.mark.parametrize(
    ("loop", "flags"),
    [
        ("pretrain", ["--model.width", "--data.path", "--training.steps"]),
        ("rl", ["--rollout.lag", "--init-from"]),
        ("diffusion", ["--model.attention.heads", "--flow.shift"]),
        ("sft", ["--sample.prompts"]),
        ("preference", ["--reference"]),
        ("reward", ["--data.path"]),
        ("vae", ["--run.directory"]),
    ],
)
def test_every_loop_shows_its_help_without_a_recipe(loop, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(find_loop(loop).Config, ["--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0 and [flag for flag in flags if flag not in page] == []


def test_help_without_a_file_shows_the_groups_that_a_file_must_give(capsys):
    @dataclass(frozen=True)
    class Outer:
        model: Config

    with pytest.raises(SystemExit) as caught:
        load_config(Outer, ["--help"])
    assert caught.value.code == 0 and "--model.optimizer.peak-lr" in capsys.readouterr().out
