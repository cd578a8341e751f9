"""Notebooks run from the first cell to the last, show their pictures, and are kept without outputs.

What a cell displays comes from its reader's machine, so outputs are not committed; the picture of
the recorded run is in a cell of text.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

from tests.trainers.test_ablation import TINY

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_linked_and_kept_without_outputs(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    text = "\n".join(cells(notebook, "markdown"))
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all((notebook.parent / link).exists() for link in links) and "![" in text
    assert f"({notebook.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose ablation is two variants of three steps."""
    recipes = tmp_path / "configs/ablations/attention"
    recipes.mkdir(parents=True)
    (tmp_path / "text").mkdir()
    for i, source in enumerate(sorted((ROOT / "step_jax/core").glob("c*.py"))):
        (tmp_path / f"text/{i}.py").write_text(source.read_text(encoding="utf-8"))
    places = {"runs": tmp_path / "unused", "text": tmp_path / "text", "cache": tmp_path / "cache"}
    tiny = TINY.format(**places).replace("vocab_size: 300", "vocab_size: 400")
    (recipes / "base.yaml").write_text(tiny)
    (recipes / "mha.yaml").write_text("base: base.yaml\n")
    paper = "base: base.yaml\nmodel: {init: {kind: fixed, std: 0.02}}\n"
    (recipes / "mha_paper_init.yaml").write_text(paper)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def shown(monkeypatch):
    """What cells display: (kind, content). Jupyter is not among the test tools."""
    found: list[tuple[str, str]] = []
    stand_in = types.ModuleType("IPython.display")
    stand_in.Image = lambda filename: ("image", filename)
    stand_in.Markdown = lambda text: ("markdown", text)
    stand_in.display = found.append
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    return found


@pytest.mark.thorough
def test_the_ablation_runs_from_the_first_cell_to_the_last(checkout, shown, capsys):
    first, *others = cells(ROOT / "notebooks/attention_ablation.ipynb", "code")
    names: dict[str, object] = {}
    exec(first, names)
    assert names["ROOT"] == checkout and names["SEEDS"] == (0, 1, 2)
    names["SEEDS"] = (0,)
    for cell in others:
        exec(cell, names)
    (table, markdown), (image, file) = shown
    assert (table, image) == ("markdown", "image")
    assert "| mha_paper_init |" in markdown
    assert Path(file).is_relative_to(checkout) and Path(file).read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "mha seed 0: " in out and "mha: the paper's initialisation minus ours" in out


def test_every_notebook_is_run():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["attention_ablation"]
