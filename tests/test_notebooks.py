"""Notebooks run in a kernel from the first cell to the last, and are kept without outputs.

What a cell displays comes from its reader's machine, so outputs are not committed; the picture of
the recorded run is in a cell of text. Each notebook has its pair as Python, which is what is
edited: ``jupytext --sync notebooks/NAME.py``. Tests make them small by a cell behind the one that
is tagged ``parameters``.
"""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import json
import re
import signal
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import step_jax
from tests.trainers.test_ablation import TINY

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


# --- how they are kept ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_its_pair(notebook):
    def kept(path: Path):
        book = jupytext.read(path)
        return [(c.cell_type, c.source, c.metadata.get("tags")) for c in book.cells]

    assert kept(notebook) == kept(notebook.with_suffix(".py")), f"jupytext --sync {notebook}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_uses_public_names(notebook):
    """Of the package, or of its modules: then with a text that says what they do."""
    tree = ast.parse(notebook.with_suffix(".py").read_text(encoding="utf-8"))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    for node in (n for n in imports if n.module.partition(".")[0] == "step_jax"):
        for name in (alias.name for alias in node.names):
            if node.module == "step_jax" and name in step_jax.__all__:
                continue
            module = importlib.import_module(node.module)
            if not hasattr(module, name):  # a module of it
                importlib.import_module(f"{node.module}.{name}")
            found = getattr(module, name)
            assert not name.startswith("_") and inspect.getdoc(found), f"{node.module}: {name}"


# --- run in a kernel ------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a recipe of three steps, and a kernel's environment."""
    recipes = tmp_path / "configs/ablations/attention"
    recipes.mkdir(parents=True)
    (tmp_path / "text").mkdir()
    for i, source in enumerate(sorted((ROOT / "step_jax/core").glob("c*.py"))):
        (tmp_path / f"text/{i}.py").write_text(source.read_text(encoding="utf-8"))
    places = {"runs": tmp_path / "runs/tiny", "text": tmp_path / "text", "cache": tmp_path / "c"}
    tiny = TINY.format(**places).replace("vocab_size: 300", "vocab_size: 400")
    (tmp_path / "configs/tiny.yaml").write_text(tiny)
    (recipes / "base.yaml").write_text(tiny)
    (recipes / "mha.yaml").write_text("base: base.yaml\n")
    paper = "base: base.yaml\nmodel: {init: {kind: fixed, std: 0.02}}\n"
    (recipes / "mha_paper_init.yaml").write_text(paper)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    return tmp_path


class Executed:
    """What a notebook showed."""

    def __init__(self, book: nbformat.NotebookNode):
        outputs = [o for c in book.cells if c.cell_type == "code" for o in c.outputs]
        data = [o.get("data", {}) for o in outputs]
        self.printed = "".join(o.text for o in outputs if o.output_type == "stream")
        self.shown = [d.get("text/markdown") or d.get("text/plain", "") for d in data]
        self.text = "\n".join([self.printed, *self.shown])
        self.pictures = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
        assert all(p.startswith(b"\x89PNG") for p in self.pictures)


def execute(name: str, checkout: Path, small: str) -> Executed:
    """Runs a notebook in a kernel, made small by a cell behind its parameters."""
    book = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    tagged = [i for i, c in enumerate(book.cells) if "parameters" in c.metadata.get("tags", ())]
    (at,) = tagged
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(small))
    folder = {"metadata": {"path": str(checkout / "notebooks")}}
    NotebookClient(book, timeout=600, kernel_name="python3", resources=folder).execute()
    return Executed(book)


def test_a_run_is_a_table(checkout):
    real = ROOT / "tests/runs/real/quick"
    found = execute("run_as_table", checkout, f"RUN = Path({str(real)!r})")
    assert len(found.pictures) == 1
    assert "training a tokenizer of 4096 pieces" in found.text and "of it for data" in found.text


@pytest.mark.thorough
def test_an_ablation(checkout):
    found = execute("attention_ablation", checkout, "SEEDS = (0,)")
    assert len(found.pictures) == 1 and "| mha_paper_init |" in found.text
    assert "mha seed 0: " in found.text
    assert "mha: the paper's initialisation minus ours" in found.text
    assert (checkout / "runs/ablations/attention/mha/seed_0/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_sweep_and_its_laws(checkout):
    recipe = checkout / "configs/tiny.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 3", "tokens: 256"))
    small = (
        "RECIPE = ROOT / 'configs/tiny.yaml'\nRATES = ('1e-2',)\n"
        "WIDTHS = ('8', '16', '24')\nTOKENS = ('256', '512')"
    )
    found = execute("scaling_laws", checkout, small)
    assert len(found.pictures) == 2 and "Best: optimizer.learning_rate" in found.text
    assert re.search(r"here: +rate\* = \S+ N\^\S+ D\^\S+", found.text)
    assert re.search(r"loss = \S+ \+ \S+ / N\^\S+ \+ \S+ / D\^\S+", found.text)


@pytest.mark.thorough
def test_what_a_model_writes_and_where_it_looks(checkout):
    small = "RECIPE, RUN, TOKENS = ROOT / 'configs/tiny.yaml', ROOT / 'runs/tiny', 8"
    found = execute("generation_and_attention", checkout, small)
    assert len(found.pictures) == 2
    assert "--- temperature 0.7\ndef " in found.text and "previous_token" in found.text


@pytest.mark.thorough
def test_a_plan(checkout, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    small = (
        "RECIPE, TOPOLOGY = ROOT / 'configs/tiny.yaml', 'cpu:8'\nFLAGS = ['--model.vocab', '400']\n"
        "OTHERS = []"
    )
    found = execute("planning_a_pod", checkout, small)
    assert len(found.pictures) == 1 and "**tiny on cpu:8**: fits" in found.text
    assert "as it stands" in found.text


def test_every_notebook_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert sorted(re.findall(r'execute\("(\w+)"', source)) == [n.stem for n in NOTEBOOKS]


# --- interrupted ----------------------------------------------------------------------------------


class Cells:
    """A kernel as a front end has it: cells go in, what they say comes out."""

    def __init__(self, folder: Path):
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(cwd=str(folder))

    def start(self, code: str) -> None:
        self.request = self.client.execute(code)
        self.seen = ""

    def until(self, words: str = "", seconds: float = 120) -> str:
        """What the cell said until it said this; without words, until it is idle."""
        deadline = time.monotonic() + seconds
        while not words or words not in self.seen:
            message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != self.request:
                continue
            content = message["content"]
            self.seen += content.get("text", "") + content.get("ename", "")
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                assert not words, self.seen
                break
        return self.seen

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.mark.thorough
def test_a_kernel_is_interrupted_once_and_twice(checkout):
    """Once: the run saves after its step. Twice: it stops at once. The kernel goes on."""
    kernel = Cells(checkout)
    try:
        kernel.start(
            "from step_jax import PretrainConfig, load_config, pretrain, read_metrics\n"
            "flags = ['--training.steps', 10**7, '--run.logging.every', 1]\n"
            "config = load_config(PretrainConfig, ['configs/tiny.yaml', *flags]).config\n"
            "pretrain(config)"
        )
        kernel.until("step 3")
        kernel.manager.interrupt_kernel()
        seen = kernel.until()
        assert "saving at the next step" in seen and seen.endswith("KeyboardInterrupt")
        kernel.start("print(read_metrics('runs/tiny')[-1]['status'])")
        assert "interrupted" in kernel.until()
        kernel.start(
            "import time\nfrom step_jax.runs.preemption import StopSignal\n"
            "with StopSignal(print):\n    print('inside')\n    time.sleep(100)"
        )
        kernel.until("inside")
        began = time.monotonic()
        kernel.manager.signal_kernel(signal.SIGINT)
        kernel.until("a second one stops at once without saving")
        kernel.manager.signal_kernel(signal.SIGINT)
        assert kernel.until().endswith("KeyboardInterrupt") and time.monotonic() - began < 60
        kernel.start("print('still here')")
        assert "still here" in kernel.until()
    finally:
        kernel.close()
