"""The golden tables hold what is claimed, and the compiler still says the same (``aot``)."""

from __future__ import annotations

import json

import pytest

from tests.planning import golden

TABLES = golden.tables()
SMALLEST = 1e-3  # of the largest collective: smaller ones may come and go


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_tables():
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_recipe_fits_and_classes_make_the_compilers_total(path):
    table = load(path)
    assert (golden.ROOT / table["recipe"]).exists()
    assert table["memory_compiler"] <= table["memory_limit"]
    assert table["memory_total"] == pytest.approx(table["memory_compiler"], rel=0.05)
    assert sum(table["memory"].values()) == pytest.approx(table["memory_total"])
    assert 0 < table["flops_model"] <= table["flops"]


def recipe_of(path):
    """A table as a test's argument; those of recipes for pods take minutes."""
    small = load(path)["recipe"].startswith("tests/")
    return pytest.param(path, id=path.stem, marks=() if small else pytest.mark.aot)


@pytest.mark.parametrize("path", map(recipe_of, TABLES))
def test_compiles_to_the_same_figures(path, topology):
    table = load(path)
    now = golden.make(table["recipe"], table["topology"], table["flags"])
    for name in ("memory_compiler", "memory_total", "flops", "flops_model"):
        assert now[name] == pytest.approx(table[name], rel=0.02), name
    assert now["mesh"] == table["mesh"]
    floor = SMALLEST * max(table["collectives"].values())
    assert now["collectives"] == pytest.approx(table["collectives"], rel=0.02, abs=floor)
