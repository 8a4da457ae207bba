"""TPU slices and GPUs by name, to compile for chips that are not there.

`libtpu` (extra `tpu`) compiles for a slice without a TPU, and jax's plugin for CUDA (extra `cuda`)
for NVIDIA GPUs without a GPU. The numbers of TPUs are those that Google publishes at
https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, and those of GPUs are from NVIDIA's
data sheets: of the SXM models, without sparsity.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxft.devices import BATCH_AXIS, Devices, Sharding
from jaxft.errors import ParallelError
from jaxft.gpu_target import GpuTarget, gpus
from jaxft.matmul_precision import MatmulPrecision


@dataclass(frozen=True)
class Chip:
    """Published numbers of a TPU chip or GPU.

    Attributes:
      name: such as `v5e`.
      peak_flops: bfloat16 operations per second.
      float32_flops: float32 operations per second by the precision of products. No number is
        published for a TPU: a product of float32 factors takes one, three or six of bfloat16.
      bandwidth: bytes per second between HBM and the chip.
      hbm: bytes of HBM.
      usable: bytes of it that programs can use. libtpu keeps the rest, and refuses to compile
        programs that need more; of a GPU's memory JAX takes 75 %.
      cores: what a slice's name counts per chip: 2 for `v4-8`, which has 4 chips; 1 for `v5e-8`.
      shapes: number of chips to the arrangement that the compiler knows.
      gpu: architecture of a GPU; None for a TPU.
    """

    name: str
    peak_flops: float
    float32_flops: dict[MatmulPrecision, float]
    bandwidth: float
    hbm: int
    usable: int
    cores: int
    shapes: dict[int, str]
    gpu: GpuTarget | None = None

    def peak(self, dtype: str | None, precision: MatmulPrecision) -> float:
        """Returns the operations per second of a network that computes in this type.

        A type other than bfloat16 counts as float32.
        """
        return self.peak_flops if dtype == "bfloat16" else self.float32_flops[precision]


_SQUARES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}

_GPUS = {**{n: f"1x1x{n}" for n in (1, 2, 4, 8)}, **{8 * n: f"1x{n}x8" for n in (2, 4, 8, 16, 32)}}
_GIB = 2**30


def _tpu(
    name: str, tflops: float, bandwidth: float, memory: tuple[float, float], cores: int
) -> Chip:
    """Returns a TPU chip; `memory` in GiB, with and without the reserve of libtpu 0.0.52."""
    peak = tflops * 1e12
    return Chip(
        name,
        peak,
        {"default": peak, "high": peak / 3, "highest": peak / 6},
        bandwidth,
        int(memory[0] * _GIB),
        int(memory[1] * _GIB),
        cores,
        _CUBES if cores > 1 else _SQUARES,
    )


def _gpu(
    name: str, tflops: tuple[float, float, float], bandwidth: float, memory: int, gpu: GpuTarget
) -> Chip:
    """Returns a GPU; `tflops` in bfloat16, TF32 and float32, `memory` in GiB."""
    bfloat16, tf32, float32 = (each * 1e12 for each in tflops)
    precisions: dict[MatmulPrecision, float] = {"default": tf32, "high": tf32, "highest": float32}
    size = memory * _GIB
    return Chip(name, bfloat16, precisions, bandwidth, size, size * 3 // 4, 1, _GPUS, gpu)


_AMPERE = GpuTarget((8, 0), 108, 64, shared_memory=164, cache=40, clock=1.41)
_HOPPER = GpuTarget((9, 0), 132, 128, shared_memory=228, cache=50, clock=1.98)

CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 1228e9, (32, 30.75), cores=2),
        _tpu("v5e", 197, 819e9, (16, 15.75), cores=1),
        _tpu("v5p", 459, 2765e9, (95, 95), cores=2),
        _tpu("v6e", 918, 1640e9, (32, 31.24), cores=1),
        _gpu("a100", (312, 156, 19.5), 2039e9, 80, _AMPERE),
        _gpu("h100", (989.4, 494.7, 66.9), 3350e9, 80, _HOPPER),
        _gpu("h200", (989.4, 494.7, 66.9), 4800e9, 141, _HOPPER),
    )
}


@dataclass(frozen=True)
class Topology:
    """One or several TPU slices, or GPUs.

    Attributes:
      name: such as `v5e-8`, `2xv5e-16` for two slices, or `h100-8`.
      chip: the chips.
      chips: number of chips in all slices.
      slices: number of slices.
    """

    name: str
    chip: Chip
    chips: int
    slices: int = 1

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Returns the topology of a name as in `gcloud`: `v5e-8`, `v4-32`, `2 x v5e-16`, `h100-8`.

        Names of v4 and v5p count TensorCores, of which a chip has two. More than eight GPUs are on
        several hosts.

        Raises:
          ParallelError: the name is unknown.
        """
        match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?([a-z]\w+?)-(\d+)", name.strip())
        chip = CHIPS.get(match[2].replace("litepod", "e")) if match else None
        if not match or not chip:
            raise ParallelError(
                f"{name!r} is no topology. Write the chip and the size of the slice, such as "
                f"v5e-8, v4-32, 2xv5e-16 or h100-8; the chips are {', '.join(CHIPS)}."
            )
        chips, slices = int(match[3]) // chip.cores, int(match[1] or 1)
        of_gpus = chip.gpu and slices > 1
        if chips not in chip.shapes or int(match[3]) % chip.cores or of_gpus:
            sizes = ", ".join(f"{chip.name}-{count * chip.cores}" for count in chip.shapes)
            raise ParallelError(f"there is no slice {name!r}; there are {sizes}.")
        label = f"{chip.name}-{match[3]}"
        return cls(label if slices == 1 else f"{slices}x{label}", chip, chips * slices, slices)

    def devices(self, sharding: Sharding = "replicated") -> Devices:
        """Returns the chips, to compile for; they cannot run anything.

        Raises:
          ParallelError: libtpu, or jax's plugin for CUDA, is not installed.
        """
        shape, gpu = self.chip.shapes[self.chips // self.slices], self.chip.gpu
        if gpu:
            text = gpu.description(self.chip.name, self.chip.hbm, self.chip.bandwidth)
            return _devices(gpus(self.name, shape, text), sharding)
        if not find_spec("libtpu"):
            raise ParallelError(
                f"compiling for {self.name} needs libtpu: pip install 'jaxft[tpu]'. No TPU is "
                "needed."
            )
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores are one device
        with _libtpu_without_tpu():
            description = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.name}:{shape}",
                **options,
            )
        return _devices(description.devices, sharding)


def _devices(chips: Any, sharding: Sharding) -> Devices:
    ordered = sorted(chips, key=lambda x: (x.process_index, x.id))
    return Devices(sharding, Mesh(np.array(ordered), (BATCH_AXIS,), axis_types=(AxisType.Auto,)))


_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists; the topology has its own name
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextmanager
def _libtpu_without_tpu() -> Iterator[None]:
    """Lets libtpu start where there is no TPU, or another process uses it, without warnings.

    Otherwise it asks the cloud's metadata server, which only TPU VMs have, for the accelerator and
    the hosts, and refuses a second process. Variables that the user has set stay.
    """
    missing = [name for name in _WITHOUT_TPU if name not in os.environ]
    os.environ.update({name: _WITHOUT_TPU[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
