"""One train step compiled for a pod by step_jax and by MaxText: memory, communication, CPU time.

    python benchmarks/peers/train_compile.py --maxtext-python PYTHON [--model llama2_7b] ...

PYTHON is an interpreter of an environment with MaxText. Both compile the same model, batch,
sequence and remat policy for the same topology with whatever libtpu is set (TPU_LIBRARY_PATH makes
it one and the same for both). Collectives are counted in both programs by ``step_jax.planning``.
CPU seconds are those of the whole command, imports (from bytecode on disk) included, and of our
compilation alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from step_jax.planning import collectives, hlo, operations

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One comparison: the recipe and topology in our words and in MaxText's, and its batch."""

    recipe: str
    topology: str
    maxtext_model: str
    maxtext_topology: str
    devices: int
    rows_per_device: int = 4
    sequence: int = 4096


CASES = {
    "llama2_7b": Case("llama2_7b", "v5p:4x4x4", "llama2-7b", "v5p-128", 64),
    "mixtral_8x7b": Case("mixtral_8x7b", "v5p:4x4x4", "mixtral-8x7b", "v5p-128", 64),
    "deepseek_v3": Case("deepseek_v3", "v5p:8x8x8", "deepseek3-671b", "v5p-1024", 512, 1),
}
MAXTEXT = (
    "run_name=train_compile",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
    "enable_goodput_recording=false",
    "log_config=false",
    "compile_topology_num_slices=1",
    "remat_policy=full",
    "steps=8",
)
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True)
class Figures:
    """Of one device: bytes of memory without the program's own, bytes sent, CPU seconds."""

    argument: float
    temporary: float
    total: float
    collectives: dict[str, float]
    flops: float
    cpu_seconds: float

    @property
    def sent(self) -> float:
        return sum(self.collectives.values())


def import_once(python: str, module: str) -> None:
    """So that the modules' bytecode is on disk and both start alike."""
    env = os.environ | BYTECODE | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    subprocess.run([python, "-c", f"import {module}"], env=env, capture_output=True, cwd=ROOT)


def measured(command: list[str], env: dict[str, str], limit: int) -> tuple[str, float]:
    """(output, CPU seconds) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=os.environ | BYTECODE | env, capture_output=True, text=True, timeout=limit
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout + done.stderr, seconds


def ours(case: Case, flags: list[str], limit: int) -> tuple[Figures, float]:
    """(figures of our step, CPU seconds of its compilation alone)."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = ROOT / "configs" / "peers" / f"{case.recipe}.yaml"
        rows = case.devices * case.rows_per_device
        command = [sys.executable, "-m", "step_jax.cli", "plan", str(recipe)]
        command += ["--topology", case.topology, "--output", folder, "--force"]
        command += ["--training.batch_size", str(rows), "--execution.remat", "full", *flags]
        _, seconds = measured(command, {"JAX_PLATFORMS": "cpu"}, limit)
        plan = json.loads(next(Path(folder).glob("*.json")).read_text())
    sent: dict[str, float] = {}
    for c in plan["collectives"]:
        sent[c["kind"]] = sent.get(c["kind"], 0.0) + c["nbytes"]
    total = plan["memory_compiler"] - plan["memory"]["program"]
    argument = plan["memory_arguments"]
    figures = Figures(argument, total - argument, total, sent, plan["flops"], seconds)
    return figures, plan["compile_cpu_s"]


def maxtext(case: Case, python: str, overrides: list[str], limit: int) -> Figures:
    """Figures of MaxText's ``train_compile``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "maxtext.trainers.pre_train.train_compile", *MAXTEXT]
        command += [
            f"base_output_directory={folder}",
            f"model_name={case.maxtext_model}",
            f"compile_topology={case.maxtext_topology}",
            f"per_device_batch_size={case.rows_per_device}",
            f"max_target_length={case.sequence}",
            *overrides,
        ]
        env = {
            "DECOUPLE_GCLOUD": "TRUE",
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "PYTHONPATH": "",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        }
        output, seconds = measured(command, env, limit)
        dumps = [p for p in Path(folder).glob("*train_step*.after_optimizations.txt")]
        module = hlo.parse(max(dumps, key=lambda p: p.stat().st_size).read_text())
    stats = {k: float(v) for k, v in re.findall(r"(?<!host_)\b(\w+)_size_in_bytes=(\d+)", output)}
    executions, endless = hlo.executions(module)
    if endless:
        print(f"maxtext: loops of unknown length, counted once: {', '.join(endless)}")
    sent: dict[str, float] = {}
    for c in collectives.communication(module, executions, {"all": case.devices}):
        sent[c.kind] = sent.get(c.kind, 0.0) + c.nbytes
    total = stats["argument"] + stats["output"] - stats["alias"] + stats["temp"]
    flops = operations.count(module, executions).flops
    return Figures(stats["argument"], stats["temp"], total, sent, flops, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--maxtext-python", required=True, metavar="PYTHON")
    parser.add_argument("--model", choices=CASES, default="llama2_7b")
    parser.add_argument("--ours", default="", help="flags of our recipe, such as a mesh")
    parser.add_argument("--maxtext", default="", help="MaxText overrides, key=value")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each")
    a = parser.parse_args()

    case = CASES[a.model]
    import_once(sys.executable, "step_jax.planning.report, matplotlib.pyplot")
    import_once(a.maxtext_python, "maxtext.trainers.pre_train.train_compile")
    mine, compile_seconds = ours(case, a.ours.split(), a.limit)
    theirs = maxtext(case, a.maxtext_python, a.maxtext.split(), a.limit)
    rows = case.devices * case.rows_per_device
    print(f"{a.model}, {case.topology}, {rows} rows of {case.sequence}, remat full")
    print(f"{'':24}{'step_jax':>12}{'MaxText':>12}{'ratio':>8}")
    table = {
        "arguments, GB": (mine.argument / 1e9, theirs.argument / 1e9),
        "temporaries, GB": (mine.temporary / 1e9, theirs.temporary / 1e9),
        "memory in all, GB": (mine.total / 1e9, theirs.total / 1e9),
        "sent by a device, GB": (mine.sent / 1e9, theirs.sent / 1e9),
        "TFLOP of a device": (mine.flops / 1e12, theirs.flops / 1e12),
        "CPU-s of the command": (mine.cpu_seconds, theirs.cpu_seconds),
    }
    for name, (x, y) in table.items():
        print(f"{name:24}{x:12.3f}{y:12.3f}{x / y:8.3f}")
    for name, figures in (("step_jax", mine), ("MaxText", theirs)):
        kinds = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in figures.collectives.items())
        print(f"{name}: {kinds}")
    print(f"step_jax: {compile_seconds:.0f} CPU-s of tracing and compiling alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
