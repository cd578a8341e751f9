"""The hardware table against JAX's own and against itself."""

import types

import jax
import jax.numpy as jnp
import pytest

from step_jax.core import hardware
from step_jax.core.hardware import CHIPS, from_device_kind
from step_jax.ops.einsum import einsum


def tpu_info():
    try:
        from jax._src import tpu_info  # JAX 0.12
    except ImportError:
        from jax._src.pallas.mosaic import tpu_info
    return tpu_info


@pytest.mark.parametrize(
    ("kind", "cores"),
    [("TPU v4", 2), ("TPU v5 lite", 1), ("TPU v5p", 2), ("TPU v6 lite", 1), ("TPU7x", 1)],
)
def test_tpus_agree_with_jax(kind, cores):
    info = tpu_info()
    version = info.chip_version_from_device_kind(kind)
    theirs = info.get_tpu_info_for_chip(version, cores)
    chip = from_device_kind(kind)
    factor = 1 if theirs.hbm_capacity_bytes * 2 > chip.hbm_bytes * 1.5 else theirs.num_cores
    assert chip.bf16 == pytest.approx(theirs.bf16_ops_per_second * factor, rel=0.01)
    assert chip.hbm_bytes == pytest.approx(theirs.hbm_capacity_bytes * factor, rel=0.01)
    assert chip.hbm_bandwidth == pytest.approx(theirs.mem_bw_bytes_per_second * factor, rel=0.13)
    assert chip.vmem_bytes == theirs.vmem_capacity_bytes


def test_every_asked_chip_is_there_and_sane():
    assert list(CHIPS) == [
        "v4",
        "v5e",
        "v5p",
        "v6e",
        "tpu7x",
        "A100",
        "H100",
        "H200",
        "B200",
        "GB200",
    ]
    for chip in CHIPS.values():
        assert chip.fp32 <= chip.bf16 and (not chip.fp8 or chip.fp8 >= chip.bf16)
        assert 10e9 < chip.hbm_bytes < 300e9 and 0.5e12 < chip.hbm_bandwidth < 10e12
        assert 25e9 <= chip.link_bandwidth <= 110e9
        assert chip.peak("bf16") == chip.bf16


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("TPU v5", "v5p"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 PCIe", None),  # another chip under a like name
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L4", None),
        ("cpu", None),
    ],
)
def test_device_kinds(kind, name):
    chip = from_device_kind(kind)
    assert (chip and chip.name) == name


def test_missing_precision():
    with pytest.raises(ValueError, match="A100 has no fp8 matmul"):
        CHIPS["A100"].peak("fp8")


def test_a_cpu_has_no_peak_to_be_measured_against():
    """Other work during the measurement made utilisations above 200 %."""
    device = jax.local_devices(backend="cpu")[0]
    assert hardware.detect(device) is None and hardware.peak_flops(device, "fp32") is None
    assert 1e8 < hardware.measured_cpu_peak(0.02) < 1e14  # what plans forecast with


def test_the_float32_peak_of_a_tpu_is_that_of_the_program():
    """Its compiler makes six products of bfloat16 parts of a float32 one, and one of bfloat16."""

    def lowered(dtype) -> str:
        x = jax.ShapeDtypeStruct((8, 8), dtype)
        product = jax.jit(lambda x, w: einsum("TD,DF->TF", x, w))
        return product.trace(x, x).lower(lowering_platforms=("tpu",)).as_text()

    assert "precision = [HIGHEST, HIGHEST]" in lowered(jnp.float32)
    assert "HIGH" not in lowered(jnp.bfloat16)
    for name in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        peak = CHIPS[name].peak(hardware.PRECISION["float32"])
        assert 6 * peak == pytest.approx(CHIPS[name].bf16)


def test_cpu_peak_can_be_given(monkeypatch):
    monkeypatch.setenv("STEP_JAX_CPU_PEAK", "5e10")
    assert hardware.measured_cpu_peak.__wrapped__() == 5e10


@pytest.mark.parametrize(
    ("vendors", "installed", "chosen", "platforms"),
    [
        (["0x8086"], {"libtpu"}, None, "cpu"),  # a laptop that compiles for TPUs
        (["0x8086", hardware.GOOGLE], {"libtpu"}, None, None),  # a TPU's host
        (["0x10de"], {"libtpu", "jax_cuda13_plugin"}, None, None),  # JAX finds the GPU
        (["0x8086"], set(), None, None),
        (["0x8086"], {"libtpu"}, "tpu", "tpu"),  # asked for by name
    ],
)
def test_tpus_are_looked_for_only_where_there_can_be_some(
    vendors, installed, chosen, platforms, tmp_path, monkeypatch
):
    """With libtpu and without a TPU, JAX would look for half a minute in every process."""
    for number, vendor in enumerate(vendors):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/vendor").write_text(f"{vendor}\n")
    config = types.SimpleNamespace(jax_platforms=chosen)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setattr(hardware, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(
        hardware.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    hardware.leave_out_absent_tpus.__wrapped__()
    assert config.jax_platforms == platforms
