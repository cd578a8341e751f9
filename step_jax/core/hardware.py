"""What accelerators can do: the figures behind MFU, rooflines and memory plans.

Figures are **per JAX device**, which is not always a chip: a v4 or v5p chip shows its two
TensorCores as one device, a TPU7x chip shows one device for each, so its figures are half a chip's.
Peaks are dense (no structured sparsity), and vendors' figures, not measurements.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

#: Where Linux describes PCI devices, and Google's number among their vendors.
PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
Precision = Literal["bf16", "fp8", "int8", "fp32"]
#: compute dtype of a run -> the precision whose peak its products have.
PRECISION: dict[str, Precision] = {"bfloat16": "bf16", "float32": "fp32"}


def cores() -> int:
    """How many of the processor's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: as people call it.
      bf16, fp8, int8: peak operations per second; 0 where the hardware has no such mode.
      fp32: peak FLOP/s of products of float32 as all programs here ask for them
        (``Precision.HIGHEST``): six bf16 passes on TPU, the float32 units of NVIDIA instead of
        TF32.
      hbm_bytes: memory size; the runtime keeps some of it.
      hbm_bandwidth: bytes per second.
      vmem_bytes: software-managed on-chip memory of a TensorCore (TPU); shared memory that one
        block can use (GPU).
      interconnect: bytes per second out of the device, all links together, one direction
        (ICI or NVLink).
      links: ICI links (one direction each) or NVLink ports that make up ``interconnect``.
      host_bandwidth: bytes per second to the host's memory, and as many from it; 0 if not known.
    """

    name: str
    bf16: float
    fp8: float
    int8: float
    fp32: float
    hbm_bytes: float
    hbm_bandwidth: float
    vmem_bytes: int
    interconnect: float
    links: int
    host_bandwidth: float = 0.0

    def peak(self, precision: Precision) -> float:
        """Peak operations per second. Raises ValueError if the hardware lacks the precision."""
        value = {"bf16": self.bf16, "fp8": self.fp8, "int8": self.int8, "fp32": self.fp32}[
            precision
        ]
        if not value:
            raise ValueError(f"{self.name} has no {precision} matmul")
        return value

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second of one link in one direction."""
        return self.interconnect / self.links


def _tpu(
    name: str,
    *,
    bf16: float,
    fp8: float,
    int8: float,
    hbm_gb: float,
    hbm_tb_per_s: float,
    vmem_mib: int,
    ici_gb_per_s: float,
    links: int,
    host_gb_per_s: float = 0,
) -> Chip:
    """A TPU from TFLOP/s, GB, TB/s, MiB and one-direction GB/s."""
    return Chip(
        name=name,
        bf16=bf16 * 1e12,
        fp8=fp8 * 1e12,
        int8=int8 * 1e12,
        fp32=bf16 / 6 * 1e12,
        hbm_bytes=hbm_gb * 1e9,
        hbm_bandwidth=hbm_tb_per_s * 1e12,
        vmem_bytes=vmem_mib * 2**20,
        interconnect=ici_gb_per_s * 1e9,
        links=links,
        host_bandwidth=host_gb_per_s * 1e9,
    )


def _gpu(
    name: str,
    *,
    bf16: float,
    fp8: float,
    int8: float,
    fp32: float,
    hbm_gb: float,
    hbm_tb_per_s: float,
    shared_kib: int,
    nvlink_gb_per_s: float,
    links: int,
    host_gb_per_s: float,
) -> Chip:
    """An NVIDIA GPU from TFLOP/s, GB, TB/s, KiB and one-direction GB/s."""
    return Chip(
        name=name,
        bf16=bf16 * 1e12,
        fp8=fp8 * 1e12,
        int8=int8 * 1e12,
        fp32=fp32 * 1e12,
        hbm_bytes=hbm_gb * 1e9,
        hbm_bandwidth=hbm_tb_per_s * 1e12,
        vmem_bytes=shared_kib * 2**10,
        interconnect=nvlink_gb_per_s * 1e9,
        links=links,
        host_bandwidth=host_gb_per_s * 1e9,
    )


_HOPPER: dict[str, Any] = dict(
    bf16=989.4, fp8=1978.9, int8=1978.9, fp32=66.9, shared_kib=227, nvlink_gb_per_s=450, links=18,
    host_gb_per_s=64,
)  # fmt: skip

# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose ICI figures for both directions
# are halved here; HBM size and VMEM from JAX's tpu_info. Where fp8 equals bf16 the hardware takes
# fp8 operands at the bf16 rate.
# Links to the host: nominal, PCIe of generation 3 (v4 to v5p), 4 (A100) and 5 with 16 lanes, of v6e
# with 8; half an NVLink-C2C of a GB200, which has two GPUs; tpu7x's is not published.
# NVIDIA: data sheets of the SXM/HGX boards, dense figures; shared memory from the CUDA guide.
# A test holds TPU peaks, HBM and VMEM to JAX's own table; of the interconnects only v5p's was read
# again at the source, and the GPU rows were not: check them before relying on them.
_TABLE = (
    _tpu(  # 3-D torus; one device is a chip of two cores
        "v4", bf16=275, fp8=0, int8=275, hbm_gb=34.4, hbm_tb_per_s=1.228, vmem_mib=16,
        ici_gb_per_s=300, links=6, host_gb_per_s=16,
    ),
    _tpu(  # 2-D torus
        "v5e", bf16=197, fp8=197, int8=394, hbm_gb=17.2, hbm_tb_per_s=0.82, vmem_mib=128,
        ici_gb_per_s=200, links=4, host_gb_per_s=16,
    ),
    _tpu(  # 3-D torus; one device is a chip of two cores; tpu_info has 2.46 TB/s
        "v5p", bf16=459, fp8=459, int8=918, hbm_gb=103, hbm_tb_per_s=2.765, vmem_mib=64,
        ici_gb_per_s=600, links=6, host_gb_per_s=16,
    ),
    _tpu(  # 2-D torus
        "v6e", bf16=918, fp8=918, int8=1836, hbm_gb=34.4, hbm_tb_per_s=1.64, vmem_mib=128,
        ici_gb_per_s=400, links=4, host_gb_per_s=32,
    ),
    _tpu(  # 3-D torus; half a chip of 2307 bf16 TFLOP/s, 206 GB, 7.4 TB/s and 600 GB/s of ICI
        "tpu7x", bf16=1153.5, fp8=2307, int8=0, hbm_gb=103, hbm_tb_per_s=3.7, vmem_mib=64,
        ici_gb_per_s=300, links=6,
    ),
    _gpu(  # SXM4, 80 GB
        "A100", bf16=312, fp8=0, int8=624, fp32=19.5, hbm_gb=80, hbm_tb_per_s=2.039, shared_kib=163,
        nvlink_gb_per_s=300, links=12, host_gb_per_s=32,
    ),
    _gpu("H100", **_HOPPER, hbm_gb=80, hbm_tb_per_s=3.35),
    _gpu("H200", **_HOPPER, hbm_gb=141, hbm_tb_per_s=4.8),
    _gpu(  # HGX
        "B200", bf16=2250, fp8=4500, int8=4500, fp32=75, hbm_gb=180, hbm_tb_per_s=8.0,
        shared_kib=227, nvlink_gb_per_s=900, links=18, host_gb_per_s=64,
    ),
    _gpu(  # one of the 72 of an NVL72 rack
        "GB200", bf16=2500, fp8=5000, int8=5000, fp32=80, hbm_gb=186, hbm_tb_per_s=8.0,
        shared_kib=227, nvlink_gb_per_s=900, links=18, host_gb_per_s=225,
    ),
)  # fmt: skip
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}

#: ``device_kind`` of a TPU -> name; the strings are those that libtpu reports.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7": "tpu7x",
    "TPU7x": "tpu7x",
}


def detect(device: jax.Device) -> Chip | None:
    """The table entry of a device, or None for one that is not in the table (a CPU, an L4)."""
    return from_device_kind(device.device_kind)


def from_device_kind(kind: str) -> Chip | None:
    """The same for the string that JAX gives as ``device_kind``."""
    if kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[kind]]
    if kind.startswith("NVIDIA"):
        words = kind.replace("-", " ").split()
        is_cut_down = "PCIe" in words or "NVL" in words or "MIG" in words
        for name in ("A100", "H100", "H200", "B200", "GB200"):
            if name in words and not is_cut_down:
                return CHIPS[name]
    return None


@functools.cache
def leave_out_absent_tpus() -> None:
    """Keeps JAX from looking for TPUs where there are none, for half a minute and with warnings.

    libtpu is installed on machines that only compile for TPUs. Call it before a device is touched.
    """
    import jax

    if jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
        return
    others = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    if any(importlib.util.find_spec(name) for name in others):
        return
    vendors = PCI_DEVICES.glob("*/vendor")
    if not any(vendor.read_text().strip() == GOOGLE for vendor in vendors):
        jax.config.update("jax_platforms", "cpu")


def has_ragged_all_to_all(device: jax.Device) -> bool:
    """Whether XLA compiles ``lax.ragged_all_to_all`` for a device.

    TPUs do, but for v5e, whose routing is limited (libtpu 0.0.52); CPUs do not (JAX 0.12), and GPUs
    synchronise with the host for it.
    """
    return device.platform == "tpu" and from_device_kind(device.device_kind) != CHIPS["v5e"]


@functools.cache
def measured_cpu_peak(seconds: float = 0.1) -> float:
    """FLOP/s of float32 matrix products on this machine's CPU devices, measured.

    The best of several products of 1024 x 1024 matrices, kept for the process. It is what a plan
    for this machine forecasts with, and no peak: on a machine with other work the measurement may
    get half the cores and a later step all of them. ``STEP_JAX_CPU_PEAK`` (FLOP/s) replaces it,
    for figures that compare.
    """
    if given := os.environ.get("STEP_JAX_CPU_PEAK"):
        return float(given)
    import jax
    import jax.numpy as jnp

    size = 1024
    device = jax.local_devices(backend="cpu")[0]
    with jax.default_device(device):
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(lambda a, b: a @ b)
        product(x, x).block_until_ready()
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_flops(device: jax.Device, precision: Precision) -> float | None:
    """Peak FLOP/s of a device for MFU, or None: a CPU has none that is true.

    Its cores are shared, their clock varies, and what their vector units reach is not known from
    here. A utilisation of a guess says nothing, and was seen above 200 %.
    """
    chip = detect(device)
    return None if chip is None else chip.peak(precision)
