"""CPU-seconds of imports and from the command to finished toy steps, beside MaxText.

    python benchmarks/peers/startup.py [--maxtext-python PATH]

Each figure is the median over ``--repeats`` fresh processes on a warm disk: the first run of each
is not counted. The toy is configs/toys/pretrain.yaml (which reads and packs real text); MaxText
gets the same shapes, and tokens made up in memory. A step counts as finished when its line is
printed; the time of the process up to there is read from the kernel.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
STEP_JAX, MAXTEXT = "step_jax.trainers.pretrain", "maxtext.trainers.pre_train.train"
# the shapes of configs/toys/pretrain.yaml
MAXTEXT_TOY = """hardware=cpu dataset_type=synthetic enable_checkpointing=false
    skip_jax_distributed_system=true enable_goodput_recording=false log_config=false
    attention=dot_product run_name=toy base_emb_dim=128 base_num_query_heads=4 base_num_kv_heads=2
    head_dim=32 base_mlp_dim=256 base_num_decoder_layers=2 vocab_size=1024 max_target_length=128
    per_device_batch_size=2 dtype=float32 steps=8""".split()


def environment() -> dict[str, str]:
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return os.environ | ours | {"DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"}


def cpu_of(pid: int) -> float:
    """User and system seconds of a live process and its threads (proc(5), fields 14 and 15)."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost(command: list[str], line: str | None) -> tuple[float, float]:
    """(CPU-seconds, wall seconds) of a process until it prints ``line``; None: until it ends."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = []
    for text in process.stdout:
        printed.append(text)
        if line is not None and line in text:
            result = cpu_of(process.pid), time.perf_counter() - start
            process.kill()
            process.wait()
            return result
    if process.wait() or line is not None:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(printed[-30:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def figures(maxtext: str | None, out: str) -> list[tuple[str, list[str], str | None]]:
    """(what, command, line at which to stop) of every row."""
    ours = [sys.executable, "-m", "step_jax.cli"]
    toy = [*ours, "pretrain", "configs/toys/pretrain.yaml", "--run.directory"]
    rows = [
        ("`step-jax --help`", [*ours, "--help"], None),
        ("import of step_jax's pretraining", importing(sys.executable, STEP_JAX), None),
        ("step_jax: command to first finished step", toy, "step 1/8 "),
        ("step_jax: command to the end (8 steps)", toy, None),
    ]
    if maxtext:
        train = [maxtext, "-m", MAXTEXT, *MAXTEXT_TOY, f"base_output_directory={out}"]
        rows += [
            ("import of MaxText's training", importing(maxtext, MAXTEXT), None),
            ("MaxText: command to first finished step", train, "completed step: 0"),
            ("MaxText: command to the end (8 steps)", train, None),
        ]
    return rows


def importing(python: str, module: str) -> list[str]:
    return [python, "-c", f"import {module}"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--maxtext-python", default=os.environ.get("STEP_JAX_MAXTEXT_PYTHON"))
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    print("| what | CPU-s | wall s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as out:
        for i, (what, command, line) in enumerate(figures(args.maxtext_python, out)):
            samples = []
            for run in range(args.repeats + 1):
                fresh = [f"{out}/{i}-{run}"] if command[-1] == "--run.directory" else []
                samples.append(cost([*command, *fresh], line))
            cpu, wall = (statistics.median(column) for column in zip(*samples[1:], strict=True))
            print(f"| {what} | {cpu:.2f} | {wall:.2f} |", flush=True)


if __name__ == "__main__":
    main()
