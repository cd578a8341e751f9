"""Host memory of importing and exporting a checkpoint of several hundred megabytes.

Measured is the kernel's peak of the process's own memory map since it was last reset. What
``getrusage`` calls the peak begins at that of the process that started this one, and shows nothing
of an import that is smaller than a large test run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from step_jax.core.spec import map_specs
from step_jax.interop import hf
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Block, Decoder, Group

SHARD = 60_000_000

SCRIPT = """
import json, sys
import jax
from step_jax.interop import hf

def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

def peak():
    return memory("VmHWM") - start

small, large, out, shard = sys.argv[1:]
config, params = hf.load_hf(small)
hf.save_hf(out + "/small", params, config, context_length=8, max_shard_size=int(shard))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted from here on
start = memory("VmRSS")
config, params = hf.load_hf(large)
jax.block_until_ready(params)
held = sum(a.nbytes for a in jax.tree.leaves(params))
imported = peak()
hf.save_hf(out + "/large", params, config, context_length=8, max_shard_size=int(shard))
print(json.dumps({"held": held, "import": imported, "both": peak()}))
"""


def decoder(width: int, layers: int) -> Decoder:
    block = Block(MHA(width // 64, 64), SwiGLU(2 * width))
    return Decoder(width, (Group(layers, (block,)),), vocab=8 * width)


@pytest.mark.slow  # 400 MB are read twice and written three times
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_the_host_holds_no_more_than_a_shard_beside_what_the_devices_hold(tmp_path):
    """A parameter of all layers is 84 MB here, twice the largest tensor and more than a shard."""
    for name, config in {"small": decoder(64, 1), "large": decoder(1024, 10)}.items():
        zeros = map_specs(lambda s: np.zeros(s.shape, np.float32), config.specs())
        hf.save_hf(tmp_path / name, zeros, config, context_length=8, max_shard_size=SHARD)
    sizes = [p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < SHARD + 100_000 and sum(sizes) > 200e6
    paths = [str(tmp_path / name) for name in ("small", "large", "out")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths, str(SHARD)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    beside = {name: (measured[name] - measured["held"]) / max(sizes) for name in ("import", "both")}
    print(f"beside what the devices hold, in shards of {max(sizes) / 1e6:.0f} MB: {beside}")
    assert max(beside.values()) <= 1.2, measured
    assert measured["import"] > 0.9 * measured["held"], "zeros that were never written"
