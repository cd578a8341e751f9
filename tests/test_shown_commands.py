"""Every command that is shown can be given: each word of it is read by what would carry it out.

A command is a line of a block, a docstring or a comment that starts with one, or a span in
backticks. ``step-jax`` lines go through :func:`step_jax.cli.main.read`, which does all that the
user's command does before its work begins. A script runs to the end of its ``parse_args``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from step_jax.cli import main as cli
from step_jax.cli import plan
from step_jax.core.errors import ConfigError
from step_jax.planning import topology
from step_jax.trainers import LOOPS
from step_jax.trainers.ablation import load_variants
from step_jax.trainers.sweep import load_sweep

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "docs", "configs", "launch", "step_jax/launch", "notebooks", "benchmarks",
          "pallas_kernels", "tests/planning/golden.py", "tests/runs/real/README.md")  # fmt: skip
KINDS = {".md", ".yaml", ".py", ".ipynb"}
RECIPE = "configs/quickstart.yaml"
#: what a page writes where users put something of theirs -> something of ours
STANDS_FOR = {"FILE.yaml": RECIPE, "RECIPE": RECIPE, "NAME": "cpu:8", "MODEL": "llama2_7b"}
REST = "..."  # what a page leaves to the reader
STARTS = (
    r"(?:[A-Z_]+=\S+ |time )*(?:step-jax(?!:)|python -m|python [\w/]+\.py|make(?! *=)|pytest)\b"
)
LINE = re.compile(rf"^[ \t#]*({STARTS}(?:[^\n\\]|\\+\n[ \t#]*)*)$", re.M)
SPAN = re.compile(rf"(?<!`)(`{{1,2}})({STARTS}[^`]*)\1(?!`)")


def shown(path: Path) -> list[str]:
    """The commands in a file, as they stand there."""
    text = path.read_text(encoding="utf-8")
    lines = text
    if path.suffix == ".md":
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        lines = "\n".join([*fenced, *re.findall(r"^    .*$", text, re.M)])
    found = LINE.findall(lines) + [span for _, span in SPAN.findall(text)]
    return [re.sub(r"\s*\\*\n[ \t#]*", " ", command) for command in found]


def words_of(command: str) -> list[str]:
    """The words of a command: without remarks and variables, with what stands in brackets."""
    command = re.split(r"\s+#|\s{2,}(?=[a-z(])", command)[0]
    words = shlex.split(re.sub(r"[\[\]]", " ", command))
    while words[0] == "time" or re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return [STANDS_FOR.get(word, word) for word in words]


def files() -> list[Path]:
    found = [f for place in PLACES for f in (ROOT / place, *sorted((ROOT / place).rglob("*")))]
    return [f for f in found if f.suffix in KINDS and f.is_file()]


SHOWN = {(str(f.relative_to(ROOT)), command): None for f in files() for command in shown(f)}


def check(words: list[str]) -> None:
    match words:
        case ["step-jax", *rest]:
            check_step_jax(rest)
        case ["python", "-m", module, *rest]:
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin, f"no module {module}"
            check_script(Path(spec.origin), rest)
        case ["python", script, *rest]:
            check_script(ROOT / script, rest)
        case ["make", *targets]:
            rules = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
            assert {t for t in targets if "=" not in t} <= set(rules)
        case ["pytest", *rest]:
            check_pytest(rest)


def check_step_jax(words: list[str]) -> None:
    if len(words) < 2 and not words[:1] == ["--help"]:  # a page that names a command
        assert not words or words[0] in LOOPS | cli.COMMANDS, words
        return
    if REST in words:
        recipe = [RECIPE] if words[0] in LOOPS and words[1] == REST else []
        words = [words[0], *recipe, *(w for w in words[1:] if w != REST)]
        if len(words) < 2:
            assert words[0] in cli.COMMANDS, words
            return
    if words == ["--help"]:
        assert cli.main(words) == 0
        return
    run, asked = cli.read(words)
    if run is plan.run and not asked.options.compare:
        check_topology(asked.options.topology)
    if words[0] == "ablate":
        load_variants(asked.paths, asked.overrides)
    if words[0] == "sweep":
        load_sweep(asked.files, asked.varied(), asked.overrides)


def check_topology(name: str) -> None:
    kind, _, shape = name.partition(":")
    if kind in topology.TPUS:  # without libtpu, which describes them
        assert shape in topology.TPUS[kind][0], name
    else:
        topology.parse(name)


def check_script(script: Path, words: list[str]) -> None:
    """The script is there, its parser takes the words, and what follows ``--`` is a command."""
    assert script.is_file(), f"no file {script}"
    if "--" in words:
        check(words[words.index("--") + 1 :])
    if REST in words or "parse_args(" not in script.read_text(encoding="utf-8"):
        return
    patch = pytest.MonkeyPatch()
    read, environment = argparse.ArgumentParser.parse_args, dict(os.environ)

    def parse_and_stop(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise SystemExit(0)

    try:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *words])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")
        pytest.fail(f"{script} did not read its command line")
    finally:
        patch.undo()
        os.environ.clear()
        os.environ.update(environment)


def check_pytest(words: list[str]) -> None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    names = {marker.partition(":")[0] for marker in markers["markers"]}
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m":
            assert set(word.split()) - {"and", "or", "not"} <= names, word
        elif not word.startswith("-"):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize(("file", "command"), SHOWN)
def test_a_command_that_is_shown_can_be_given(file, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        check(words_of(command))
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err
    except ConfigError as error:
        pytest.fail(f"{file} shows `{command}`: {error}")


def test_commands_are_found_wherever_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Say `step-jax runs DIR`, or\n\n```\nstep-jax eval a  # yes\n```\n\n"
        "    time python benchmarks/chaos.py --kills 1 -- \\\n"
        "        step-jax pretrain x.yaml --a 1\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("#   step-jax plan a.yaml [--force]   (hours)\nwidth: 1\n")
    assert [words_of(command) for path in (page, recipe) for command in shown(path)] == [
        ["step-jax", "eval", "a"],
        ["python", "benchmarks/chaos.py", "--kills", "1", "--", "step-jax", "pretrain", "x.yaml"]
        + ["--a", "1"],
        ["step-jax", "runs", "DIR"],
        ["step-jax", "plan", "a.yaml", "--force"],
    ]
    assert {"README.md", "docs/planning.md", "step_jax/launch/local.py"} <= {
        file for file, _ in SHOWN
    }


@pytest.mark.parametrize(
    "command",
    [
        "step-jax pretrain configs/quickstart.yaml --run-dir x",
        "step-jax pretrain configs/no_such_recipe.yaml",
        "step-jax pretend ...",
        "step-jax generate runs/mine --promt x",
        "step-jax plan configs/quickstart.yaml --topology v5p:3x3x3",
        "step-jax checkpoints look runs/mine",
        "step-jax ablate configs/ablations/attention --seed 3",
        "step-jax sweep configs/quickstart.yaml --vary optimizer.rate=1e-3,3e-3",
        "python benchmarks/chaos.py --kill 3 --processes",
        "python benchmarks/chaos.py -- step-jax pretrain ... --run-dir {run_dir}",
        "python benchmarks/no_such_file.py",
        "python -m pallas_kernels.tpu.schedule v1",
        "make everything",
        "pytest -m slowly tests",
    ],
)
def test_what_could_not_be_given_is_found(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ConfigError, SystemExit)) as stop:
        check(words_of(command))
    assert not isinstance(stop.value, SystemExit) or stop.value.code
