"""Plans of small recipes on simulated devices, and what is refused."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.planning import collectives, estimate, memory, report, roofline, topology
from step_jax.planning import plan as plan_lib
from step_jax.planning.case import case_of
from step_jax.planning.changes import with_changes
from step_jax.planning.compiled import program_for, resolved
from step_jax.planning.plan import advice, make_plan
from step_jax.planning.roofline import Bound
from step_jax.runs.console import make_console
from step_jax.trainers import pretrain

ROOT = Path(__file__).parents[2]
RECIPE = """
run: {directory: unused}
model:
  width: 128
  vocab: 512
  layers:
    - repeat: 4
      blocks:
        - attention: {kind: mfa, heads: 4, head_dim: 32}
          mlp: {kind: swiglu, hidden: 256}
training: {tokens: 1e6, batch_size: 16}
data: {path: unused, sequence_length: 128, vocab_size: 300}
optimizer: {kind: adamw, learning_rate: 1e-3, schedule: {kind: constant}}
execution: {dtype: float32, remat: full}
parallel: {fsdp: 4, tensor: 2}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def config(recipe):
    return load_config(pretrain.Config, [str(recipe)]).config


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(pretrain, config, topology.parse("cpu:8"), plan_lib.Request("small"))


def test_counts_of_the_compiled_step(plan):
    assert plan.mesh == {"fsdp": 4, "tensor": 2} and plan.chips == 8
    # full remat is a fourth forward pass, of which the loss and the outer products have no part
    assert 1.0 < plan.flops / plan.flops_model < 4 / 3 * 1.1
    kinds = {(c["kind"], c["axes"]) for c in plan.collectives}
    assert ("all-gather", "fsdp") in kinds
    assert any(axes == "tensor" for _, axes in kinds)


def test_memory_classes_against_shapes_and_the_compiler(plan):
    state = plan.parameters * 4 / 8  # most of it divides over all devices
    assert state <= plan.memory["parameters"] < 1.5 * state
    assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["parameters"], rel=0.05)
    assert plan.memory["gradients"] > 0
    assert plan.memory_total == pytest.approx(plan.memory_compiler, rel=1e-3)
    assert plan.memory["gaps"] >= 0
    inputs_of_layers = 4 * (16 / 4) * 128 * 128 * 4
    kept = [b["nbytes"] for b in plan.buffers if b["kind"] == "activations"]
    assert max(kept) == inputs_of_layers  # beside them what the loss keeps
    assert plan.memory["activations"] >= inputs_of_layers


def test_length_of_the_run(plan):
    assert (plan.unit, plan.work) == ("tokens", 16 * 128)
    assert plan.work_total == plan.steps * plan.work == pytest.approx(1e6, rel=0.01)
    assert plan.days * plan.work_per_day == pytest.approx(plan.work_total)
    assert plan.chip_hours == pytest.approx(plan.days * 24 * 8)


def test_bound_is_its_slowest_part():
    bound = Bound(compute=2.0, memory=1.0, network={"fsdp": 3.0, "tensor": 0.5})
    assert (bound.step, bound.by) == (3.0, "network (fsdp)")


def test_command_prints_saves_and_draws(recipe, tmp_path, capsys):
    argv = ["plan", str(recipe), "--topology", "cpu:8", "--output", str(tmp_path)]
    flags = ["--model.layers.0.repeat", "2"]
    assert main([*argv, *flags]) == 0
    text = capsys.readouterr().out
    for words in ("compiler's total", "MFU bound", "tokens per day", "all-gather over fsdp"):
        assert words in text
    name = "small_cpu_8_model.layers.0.repeat_2"  # another mesh or size is another file
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved["mesh"] == {"fsdp": 4, "tensor": 2} and saved["fits"] is True
    assert saved["flags"] == flags and saved["versions"]["jax"] == jax.__version__
    assert saved["layers"] and all(row["amount"] > 0 for row in saved["layers"])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    assert "compiler's total" in html.unescape(page) and "<svg" in page
    assert f"step-jax plan {recipe}" in html.unescape(page) and "fits, with a step" in page
    # In itself: what it names of elsewhere are the names of formats.
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", page.replace("xlink:href", "href"))
    compared = tmp_path / f"{name}.json"
    assert main(["plan", "--compare", str(compared), str(compared)]) == 0
    assert "+0.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,words",
    [
        ([], "--topology NAME"),
        (["--topology", "v9:2x2"], "v5p: 2x2x1"),
        (["--topology", "v5p:3x5x7"], "v5p has no shape '3x5x7'; it has: 2x2x1"),
        (["--topology", "gpu:z80x4"], "gpu:"),
        (["--topology", "cpu:8", "--slices", "2"], "cpu:8 has none"),
        (["--topology", "v5p:2x2x1", "--slices", "0"], "at least 1"),
        (["--topology", "cpu:4"], "does not match the 4 devices"),
        (["--topology", "cpu:8", "--training.batch_size", "6"], "'batch' has size 6, which"),
        (["--topology", "cpu:8", "--training.accumulation", "8"], "multiple of 32"),
        (["--topology", "cpu:8", "--model.vocab", "0", "--data.tokenizer", "x"], "model.vocab"),
        (["--topology", "cpu:9999"], "xla_force_host_platform_device_count=9999"),
        (["--topology", "cpu:8", "--price", "4.2"], "no price of a chip-hour with its unit"),
    ],
)
def test_bad_input_is_refused(recipe, flags, words, capsys):
    assert main(["plan", str(recipe), *flags]) == ExitCode.CONFIG
    assert words in capsys.readouterr().err


def test_gpus_are_planned_on_paper_and_the_ranking_is_saved(recipe, tmp_path, capsys):
    argv = ["plan", str(recipe), "--topology", "gpu:h200x8", "--output", str(tmp_path)]
    assert main([*argv, "--price", "2USD"]) == 0
    text = capsys.readouterr().out
    assert "--parallel.fsdp" in text and "estimated" in text and "compiled:" not in text
    saved = json.loads((tmp_path / "small_gpu_h200x8_search.json").read_text())
    best, *others = saved["proposals"]
    assert best["tokens_per_s_per_chip"] == pytest.approx(16 * 128 / best["step_s"] / 8)
    assert best["fits"] is None  # nobody asked a compiler
    assert best["chip_hours"] == pytest.approx(best["days"] * 24 * 8)
    assert (best["cost"], saved["currency"]) == (pytest.approx(2 * best["chip_hours"]), "USD")
    assert all(best["step_s"] <= p["step_s"] for p in others)
    table = (tmp_path / "small_gpu_h200x8_search.md").read_text()
    assert table.count("\n|") == len(saved["proposals"]) + 2


def test_plan_that_does_not_fit_says_what_would_help_and_no_days(plan, capsys):
    assert plan.fits and any("training.accumulation" in line for line in plan.advice)
    too_large = replace(plan, overflow="RESOURCE_EXHAUSTED: no way", days=None)
    assert not too_large.fits
    report.show(too_large, make_console(every=1))
    text = capsys.readouterr().out
    assert "none: it does not fit" in text and "days" not in text


def test_forecast_is_shown_and_drawn_by_layer_with_its_range_and_what_the_run_costs(
    plan, tmp_path, capsys
):
    expected = dict(
        step=5.0, low=4.5, high=5.5, layers={"mlp": 3.0, "attention": 1.5}, exposed=0.5, known=True
    )
    seen = replace(
        plan, forecast=expected, rate=1234.0, mfu=0.4, price=2.0, cost=4000.0, currency="USD"
    )
    report.show(seen, make_console(every=1))
    text = capsys.readouterr().out
    for words in ("mlp", "3s (60%)", "5s, 4.5s to 5.5s", "1,234", "40.0%", "USD at 2 a chip-hour"):
        assert words in text
    assert "at least" not in text  # of a forecast nothing is a least time
    assert report.draw(seen, tmp_path / "plan.png").stat().st_size > 10_000


def test_memory_that_the_compiler_offers_is_the_limit(config):
    full = SimpleNamespace(overflow=LIBTPU)
    at = topology.Topology("", "tpu", topology.CHIPS["v5e"], 4, 4, 1, (2, 2), ())
    assert plan_lib._limit(full, at) == 15.75 * 2**30
    assert plan_lib._limit(SimpleNamespace(overflow=""), at) == at.chip.hbm_bytes


def test_advice_names_settings_that_the_loop_has_and_that_still_help(config):
    classes = dict.fromkeys(memory.CLASSES, 0.0) | {"activations": 2.0, "temporaries": 1.0}
    settings = [line.split()[0].rstrip(":") for line in advice(classes, config, 128)]
    assert "execution.remat" not in settings  # full already
    assert {"training.accumulation", "parallel.context", "execution.loss_chunks"} <= set(settings)
    short = replace(config, execution=replace(config.execution, remat="none"), training=None)
    settings = [line.split()[0].rstrip(":") for line in advice(classes, short, None)]
    assert settings == ["execution.remat", "parallel.tensor"]


# --- Topologies ---------------------------------------------------------------------------------


class Chip:
    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def test_bandwidth_counts_the_links_of_a_torus():
    v5p = topology.CHIPS["v5p"]
    at = topology.Topology("", "tpu", v5p, 256, 256, 1, (4, 8, 8), ())
    mesh = np.empty((4, 8, 8), object)
    for index in np.ndindex(mesh.shape):
        mesh[index] = Chip(index)

    def speed(devices, *axes):
        group = topology.along(SimpleNamespace(axis_names="xyz", devices=devices), axes)
        return topology.bandwidth(at, group)

    link = v5p.link_bandwidth
    assert speed(mesh, "y") == 2 * link  # once around
    assert speed(mesh, "x", "y", "z") == 6 * link == v5p.interconnect
    assert speed(mesh[:, :4], "y") == link  # half of the way: a line
    assert topology.bandwidth(at, [mesh[0, y, 0] for y in (0, 4)]) == link  # every other device
    for chip in mesh[2:].flat:
        chip.slice_index = 1
    joined = SimpleNamespace(axis_names="xyz", devices=mesh)
    assert topology.crosses_slices(joined, "x") and not topology.crosses_slices(joined, "y")
    assert topology.seconds_between_slices(at, topology.NETWORK["v5p"]) == 1.0
    assert speed(mesh, "x") == link  # inside a slice: half of that dimension


@pytest.mark.parametrize(
    "name,members,kind,gathered,seconds",
    [
        # a host, one GPU of every host, whole hosts: what crosses is divided among their adapters
        ("gpu:h100x32", range(8), "all-gather", 8.0, 7.0 / 450),
        ("gpu:h100x32", range(0, 32, 8), "all-gather", 4.0, 3.0 / 50),
        ("gpu:h100x32", range(32), "all-gather", 32.0, 28.0 / 450),
        ("gpu:a100x32", range(32), "all-gather", 32.0, 24.0 / 8 / 25),
        ("gpu:h100x32", range(32), "all-to-all", 32.0, 24.0 / 50),
        ("gpu:h100x32", range(0, 16, 8), "collective-permute", 1.0, 1.0 / 50),
        ("gpu:gb200x144", range(72), "all-gather", 72.0, 71.0 / 900),
        ("gpu:gb200x144", range(144), "all-gather", 144.0, 143.0 / 900 - 1 / 900),
    ],
)
def test_gpus_of_an_island_use_nvlink_and_islands_every_adapter(
    name, members, kind, gathered, seconds
):
    """Of ``gathered`` GB a device sends all but its own part on a ring, as ``nbytes`` says."""
    at = topology.parse(name)
    group = [at.devices[i] for i in members]
    nbytes = gathered * 1e9
    if kind != "collective-permute":
        nbytes *= (len(group) - 1) / len(group)
    assert topology.seconds(at, group, kind, nbytes) == pytest.approx(seconds, rel=1e-6)


def test_pieces_of_an_axis_take_the_links_of_the_axis():
    at = topology.parse("gpu:h100x16")
    devices = np.array(at.devices).reshape(2, 8)
    mesh = SimpleNamespace(axis_names=("data", "fsdp"), devices=devices)
    whole = collectives.Traffic("all-gather", "fsdp", 1, 450e9)
    piece = collectives.Traffic("all-gather", "part of fsdp", 1, 225e9, (0, 2, 4, 6))
    assert piece.where == "fsdp in groups of 4"
    assert roofline.network([whole, piece], at, mesh) == {"fsdp": pytest.approx(1.5)}


# --- Out of memory ------------------------------------------------------------------------------

LIBTPU = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory
 required for HLO temporaries (50.11G) exceeds available HBM (15.75G). HLO module: jit_f."""
LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space
hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.
  Largest program allocations in hbm:
  1. Size: 4.00G
     Operator: op_name="jit(step)/jvp()/dot_general" source_file="x.py"
     Shape: bf16[32,4,4096,4096]{3,2,1,0}
     Unpadded size: 4.00G
  2. Size: 512.00M
     Shape: f32[8,4096]{1,0}
"""


def test_messages_of_the_compiler():
    needed, available, buffers = memory.out_of_memory(LIBTPU)
    assert (needed, available, buffers) == (50.11 * 2**30, 15.75 * 2**30, [])
    needed, available, buffers = memory.out_of_memory(LISTED)
    assert (needed, available) == (18.5 * 2**30, 15.75 * 2**30)
    assert [b.nbytes for b in buffers] == [4 * 2**30, 512 * 2**20]
    assert buffers[0].source == "jit(step)/jvp()/dot_general"
    assert memory.out_of_memory("INVALID_ARGUMENT: something else") is None


def test_mesh_of_several_slices_needs_an_axis_that_they_divide(config):
    from step_jax.core import sharding

    devices = [Chip((i, 0, 0), slice_index=i % 3) for i in range(6)]
    with pytest.raises(ConfigError, match="into 3 slices"):
        sharding._arrange((1,) * (len(sharding.AXES) - 1) + (2,), devices)


# --- Bubbles ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bubble_of_a_pipeline_is_in_the_bound(config, capsys):
    config = replace(config, execution=replace(config.execution, remat="none"))
    without, with_bubble = (
        make_plan(
            pretrain,
            replace(config, parallel=replace(config.parallel, tensor=1, **sizes)),
            topology.parse("cpu:8"),
        )
        for sizes in ({"data": 2}, {"pipeline": 2})
    )
    assert (without.bubble, without.pipeline_microbatches) == (0.0, 0)
    assert (with_bubble.bubble, with_bubble.pipeline_microbatches) == (1 / 5, 4)
    head = 3 * 2 * 16 * 128 * 512 * 128 / 8  # outside the pipeline
    layers = without.flops - head
    assert with_bubble.flops - head == pytest.approx(layers / (1 - 1 / 5), rel=0.01)
    # simulated devices have neither memory nor network that bounds them
    share = without.flops / with_bubble.flops
    assert with_bubble.mfu_bound == pytest.approx(share * without.mfu_bound, rel=1e-6)
    assert with_bubble.bound_s == pytest.approx(without.bound_s / share, rel=1e-6)
    report.show(with_bubble, make_console(every=1))
    assert "20.0% of a device's steps (4 microbatches)" in capsys.readouterr().out


def test_expert_bubble_is_what_full_buffers_cost(config):
    experts = (Experts(count=8, hidden=256),)
    mlp = MoE(experts=experts, router=Router(top_k=2), capacity=2.0)
    (group,) = config.model.layers
    group = replace(group, blocks=(replace(group.blocks[0], mlp=mlp),))
    mixture = replace(
        config,
        model=replace(config.model, layers=(group,)),
        parallel=replace(config.parallel, fsdp=2, expert=4, tensor=1),
    )

    def excess(config):
        config = resolved(config, 8)
        program = program_for(pretrain, config, topology.parse("cpu:8"))
        return estimate.expert_excess(case_of(program, config.execution))

    once = 2 * (2 * 3 * 128 * 256) * 4 * 16 * 128 / 8  # top_k experts, 4 layers, tokens of a device
    assert excess(mixture) == pytest.approx(4 * once)  # twice the load, remat full
    unlimited = replace(mlp, capacity=None)  # a shard holds 2 of 8 experts: at most 4 times
    blocks = (replace(group.blocks[0], mlp=unlimited),)
    model = replace(config.model, layers=(replace(group, blocks=blocks),))
    assert excess(replace(mixture, model=model)) == pytest.approx(3 * 4 * once)
    assert excess(config) == 0.0


def test_without_libtpu_the_plan_says_the_command_that_brings_it(recipe, monkeypatch, capsys):
    """The same that the README and the page give in place."""
    found = topology.importlib.util.find_spec
    monkeypatch.setattr(
        topology.importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["plan", str(recipe), "--topology", "v5p:2x2x1"]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert "libtpu, which is not installed: pip install 'jax[tpu]'" in said
    for page in ("README.md", "docs/planning.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.index("pip install 'jax[tpu]'") < text.index("step-jax plan configs/")


def test_changes_are_shown_with_their_rate_and_what_does_not_fit(plan, config):
    near = with_changes(plan, pretrain, config, topology.parse("gpu:h200x8"))
    title = "what would change it, all estimated before compiling"
    shown = dict(report.tables(near))[title]
    assert list(shown)[:2] == ["as it stands", "remat none"]
    assert shown["as it stands"].endswith(" tokens/s/chip")
    assert re.search(r"tokens/s/chip, [+-]\d+\.\d%$", shown["twice the batch"])
    tight = replace(near, memory_limit=1.1 * near.changes[0]["nbytes"])
    assert "(DOES NOT FIT)" in dict(report.tables(tight))[title]["twice the batch"]
    assert title not in dict(report.tables(plan))


@pytest.mark.thorough
def test_what_goes_to_the_host_is_counted(plan, config, request):
    """Compiled for TPUs: four layers, 16 rows of 128 tokens on 8 chips, float32."""
    request.getfixturevalue("topology")  # compiled as their users compile
    execution = replace(config.execution, offload=("layer", "mlp"))
    parallel = replace(config.parallel, fsdp=8, tensor=1)
    config = replace(config, execution=execution, parallel=parallel)
    v5e = topology.parse("v5e:2x4")
    sent = make_plan(pretrain, config, v5e)
    nbytes = 4 * (16 / 8 * 128) * (128 + 2 * 256) * 4
    assert (sent.to_host, sent.from_host) == (nbytes, nbytes)
    assert sent.host_s == pytest.approx(nbytes / 16e9)
    assert nbytes <= sent.memory_host < 1.1 * nbytes
    assert "the host's link" in dict(report.tables(sent))["the least time: what no step can beat"]
    case = case_of(program_for(pretrain, resolved(config, 8), v5e), execution)
    assert case is not None and estimate.host_bytes(case) == nbytes
    assert not (plan.to_host or plan.from_host or plan.memory_host or plan.host_s)
