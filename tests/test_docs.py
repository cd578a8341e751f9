"""What the documentation shows works."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
    + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def rooms_by_floor() -> dict[str, int]:
    """Each room of the README's map, and the line that it stands in, from above."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^## A map of the house.*?^```\n(.*?)^```", page, re.M | re.S)
    lines = (re.match(r"(?:\w+/\s+)+", line) for line in drawing.splitlines())
    return {room: n for n, line in enumerate(lines) for room in re.findall(r"\w+", line[0])}


def imported(file: Path) -> set[str]:
    """The rooms that a file imports from, in functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.removeprefix("step_jax.").split(".")[0] for name in names
             if name.startswith(("step_jax.", "pallas_kernels"))]  # fmt: skip
    return set(parts) - {"__version__"}


def test_the_map_shows_every_room_and_no_room_imports_from_its_floor_or_above():
    floors = rooms_by_floor()
    packages = {p.parent.name: p.parent for p in (ROOT / "step_jax").glob("*/__init__.py")}
    packages["pallas_kernels"] = ROOT / "pallas_kernels"
    assert set(floors) == set(packages)
    wrong = [
        f"{file.relative_to(ROOT)} imports from {other}"
        for room, folder in packages.items()
        for file in folder.rglob("*.py")
        for other in imported(file) - {room}
        if floors[other] <= floors[room]
    ]
    assert wrong == []


#: ``core/spec.py: init, count`` in a page: a file, and names that it defines
NAMED = re.compile(r"`([\w/.]+/[\w.]+\.py)(?:: ([\w., ()]+?))?(?:\(.*?)?`", re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_that_a_page_names_is_there(page):
    for name, defined in NAMED.findall(page.read_text(encoding="utf-8")):
        places = [root / name for root in (ROOT, ROOT / "step_jax", page.parent)]
        file = next((place for place in places if place.is_file()), None)
        assert file is not None, f"{page.name} names {name}"
        text = file.read_text(encoding="utf-8")
        for word in filter(None, re.split(r"[, ]+", defined)):
            here = rf"^\s*(?:def |class )?{word.split('.')[-1]}\b"
            assert re.search(here, text, re.M), f"{page.name} names {word} of {name}"


def templates(file: Path) -> list[str]:
    """The texts of a file, with … for what is put into them."""

    def text(node) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)

    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [text(n) for n in nodes if isinstance(n, ast.JoinedStr | ast.Constant)]


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 20
    said = [t for file in (ROOT / "step_jax").rglob("*.py") for t in templates(file)]
    assert [m for m in messages if not any(m in text for text in said)] == []


def test_every_page_of_the_docs_can_be_reached_from_the_readme():
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        links = {
            (page.parent / target).resolve()
            for page in new
            for target in re.findall(r"\]\(([^)#]+?\.md)(?:#[^)]*)?\)", page.read_text("utf-8"))
            if "://" not in target
        }
        new = links - found
    assert [p.name for p in PAGES if p not in found] == []


def test_continuous_integration_runs_what_there_is_with_the_oldest_jax():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    rules = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(jobs["test"]["strategy"]["matrix"]["command"]) <= set(rules)
    (oldest,) = {
        d.removeprefix("jax>=")
        for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if d.startswith("jax>=")
    }
    steps = [step.get("run", "") for step in jobs["oldest-jax"]["steps"]]
    assert any(f"'jax=={oldest}.*'" in step for step in steps)


# --- the site -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs/make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_a_place_in_the_site(site):
    listed = {name for names in site.SECTIONS.values() for name in names}
    written = {str(page.relative_to(ROOT)) for page in site.pages()}
    assert {name for name in written if not name.startswith("benchmarks/")} == listed


def test_links_hold_in_the_site_and_bring_along_what_they_show(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "PAGES", tmp_path)
    text = (
        "[a](../README.md#x) [b](pods.md) [c](https://d.e/f) [`g`](../configs/quickstart.yaml) "
        "![h](images/quickstart.png) [i](#j) [k](../notebooks/scaling_laws.ipynb) [l](../configs)"
    )
    assert site.rewritten(text, ROOT / "docs/runs.md") == (
        "[a](../index.md#x) [b](pods.md) [c](https://d.e/f) [`g`](../configs/quickstart.yaml) "
        "![h](images/quickstart.png) [i](#j) [k](../notebooks/scaling_laws.md) l"
    )
    copied = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.*")}
    assert copied == {"configs/quickstart.yaml", "docs/images/quickstart.png"}
