"""Builds the site: the pages as they stand in the repository, the notebooks, and the API.

    python docs/make_site.py            # into build/site
    python docs/make_site.py --serve    # to look at, at http://localhost:8000

Pages keep their places, so their links hold; the README is the first page. What they link to that
is no page (recipes, code, pictures) is copied beside them. A room of the package is a page of its
modules, from their docstrings. A link or an anchor that leads nowhere ends the build.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PAGES = BUILD / "pages"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)]*)?\)")
#: title -> pages of the repository
SECTIONS = {
    "Start": ["README.md", "docs/configuration.md", "docs/data.md", "docs/tokenizers.md",
              "docs/training.md", "docs/runs.md", "docs/checkpoints.md", "docs/artifacts.md",
              "docs/generation.md", "docs/interop.md"],
    "Loops": ["docs/sft.md", "docs/preference.md", "docs/rl.md", "docs/environments.md",
              "docs/mixture_of_experts.md", "docs/video.md", "docs/video_data.md",
              "docs/video_vae.md", "docs/writing_a_loop.md"],
    "Pods": ["docs/pods.md", "docs/planning.md", "docs/storage.md", "docs/doctor.md",
             "docs/ablations.md"],
    "Look up": ["docs/troubleshooting.md", "docs/glossary.md"],
    "Contribute": ["CONTRIBUTING.md", "docs/architecture.md", "docs/adding_an_attention_kind.md",
                   "docs/dependencies.md", "CHANGELOG.md"],
}  # fmt: skip


def pages() -> list[Path]:
    """Every page of the repository."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*found, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]


def place(source: Path) -> Path:
    """Where a file of the repository lies in the site."""
    name = source.relative_to(ROOT)
    if name == Path("README.md"):
        return PAGES / "index.md"
    return PAGES / (name.with_suffix(".md") if name.suffix == ".ipynb" else name)


def rewritten(text: str, source: Path) -> str:
    """A page with its links as they are in the site; brings along what they show."""

    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        if "://" in target or not target:
            return match[0]
        there = (source.parent / target).resolve()
        if there.is_dir():  # the site has no folders
            return words
        if there.suffix not in (".md", ".ipynb"):
            place(there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there, place(there))
        relative = place(there).relative_to(place(source).parent, walk_up=True)
        return f"{picture}[{words}]({relative.as_posix()}{anchor or ''})"

    return LINK.sub(link, text)


def write(page: Path, text: str) -> str:
    """Writes a page of the site; returns its name there."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page.relative_to(PAGES).as_posix()


def api(room: Path) -> str:
    """The page of a room: its modules, from their docstrings."""
    modules = [f for f in sorted(room.rglob("*.py")) if "_" != f.stem[0] or f.stem == "__init__"]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in modules]
    names = [name.removesuffix(".__init__") for name in names]
    listed = [f"::: {name}" for name in names]
    return write(PAGES / f"api/{room.name}.md", f"# {room.name}\n\n" + "\n\n".join(listed) + "\n")


def names() -> str:
    """The page of the names that the package itself has; where each is from is not imported."""
    tree = ast.parse((ROOT / "step_jax/__init__.py").read_text(encoding="utf-8"))
    targets = (n for n in ast.walk(tree) if isinstance(n, ast.Assign))
    (exports,) = (
        ast.literal_eval(n.value) for n in targets if ast.unparse(n.targets[0]) == "_EXPORTS"
    )
    rows = []
    for name, origin in exports.items():
        module = origin.partition(":")[0]
        rows.append(f"| `{name}` | [`{module}`]({module.split('.')[1]}.md#{module}) |")
    head = "# step_jax\n\nWhat `from step_jax import ...` has, and where it is from.\n\n"
    table = "| name | module |\n|---|---|\n" + "\n".join(rows)
    return write(PAGES / "api/step_jax.md", f"{head}{table}\n")


def navigation() -> list[dict]:
    """Writes all pages of the site; returns its table of contents."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for source in pages():
        write(place(source), rewritten(source.read_text(encoding="utf-8"), source))
    books = []
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = jupytext.writes(jupytext.read(source), "md")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # for editors
        books.append(write(place(source), rewritten(text, source)))
    rooms = [f.parent for f in sorted((ROOT / "step_jax").glob("*/__init__.py"))]
    sections = {
        title: [place(ROOT / name).relative_to(PAGES).as_posix() for name in names]
        for title, names in SECTIONS.items()
    }
    measured = [place(p).relative_to(PAGES).as_posix() for p in ROOT.glob("benchmarks/**/*.md")]
    sections |= {"Notebooks": books, "Measured": sorted(measured)}
    sections["API"] = [names(), *(api(room) for room in rooms if room.name != "cli")]
    return [{title: names} for title, names in sections.items()]


CONFIGURATION = """\
[project]
site_name = "step_jax"
site_description = "Train the Step family of models with JAX"
docs_dir = "pages"
site_dir = "site"
use_directory_urls = false
nav = {nav}

[project.theme]
features = ["navigation.sections", "navigation.top", "content.code.copy", "toc.follow"]
font = false

[project.markdown_extensions.toc]
permalink = true
[project.markdown_extensions.tables]
[project.markdown_extensions.pymdownx.highlight]
[project.markdown_extensions.pymdownx.superfences]

[project.plugins.mkdocstrings.handlers.python]
paths = ["{ROOT}"]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
heading_level = 2
show_root_heading = true
show_source = false
show_root_full_path = true
members_order = "source"
filters = ["!^_"]
show_submodules = false
separate_signature = true
show_signature_annotations = true
signature_crossrefs = true
extensions = ["{ROOT}/docs/field_sections.py"]

[project.plugins.mkdocstrings.handlers.python.options.docstring_options]
warnings = false
"""


def toml(value: object) -> str:
    """Lists and tables of texts, in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="build, and show it in a browser")
    options = parser.parse_args(argv)
    nav = navigation()
    (BUILD / "zensical.toml").write_text(
        CONFIGURATION.format(nav=toml(nav), ROOT=ROOT), encoding="utf-8"
    )
    return build(["serve"] if options.serve else ["build", "--clean", "--strict"])


def build(words: list[str]) -> int:
    """Zensical's exit code."""
    return subprocess.run(
        [Path(sys.executable).with_name("zensical"), *words], cwd=BUILD
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
