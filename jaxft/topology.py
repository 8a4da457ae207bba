"""TPU slices by name, to compile for chips that are not there.

`libtpu` (extra `tpu`) compiles for a slice without a TPU. The chips' numbers are those that Google
publishes at https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
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


@dataclass(frozen=True)
class Chip:
    """Published numbers of a TPU chip.

    Attributes:
      name: such as `v5e`.
      peak_flops: bfloat16 operations per second.
      bandwidth: bytes per second between HBM and the chip.
      hbm: bytes of HBM.
      cores: what a slice's name counts per chip: 2 for `v4-8`, which has 4 chips; 1 for `v5e-8`.
      shapes: number of chips to the arrangement that libtpu knows.
    """

    name: str
    peak_flops: float
    bandwidth: float
    hbm: float
    cores: int
    shapes: dict[int, str]


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

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 32 * 2**30, 2, _CUBES),
        Chip("v5e", 197e12, 819e9, 16 * 2**30, 1, _SQUARES),
        Chip("v5p", 459e12, 2765e9, 95 * 2**30, 2, _CUBES),
        Chip("v6e", 918e12, 1640e9, 32 * 2**30, 1, _SQUARES),
    )
}


@dataclass(frozen=True)
class Topology:
    """One or several TPU slices.

    Attributes:
      name: such as `v5e-8`, or `2 x v5e-16` for two slices.
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
        """Returns the topology of a name as in `gcloud`: `v5e-8`, `v4-32`, `2 x v5e-16`.

        Names of v4 and v5p count TensorCores, of which a chip has two.

        Raises:
          ParallelError: the name is unknown.
        """
        match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(v\w+?)-(\d+)", name.strip())
        chip = CHIPS.get(match[2].replace("litepod", "e")) if match else None
        if not match or not chip:
            raise ParallelError(
                f"{name!r} is no topology. Write the chip and the size of the slice, such as "
                f"v5e-8, v4-32 or 2xv5e-16; the chips are {', '.join(CHIPS)}."
            )
        chips, slices = int(match[3]) // chip.cores, int(match[1] or 1)
        if chips not in chip.shapes or int(match[3]) % chip.cores:
            sizes = ", ".join(f"{chip.name}-{count * chip.cores}" for count in chip.shapes)
            raise ParallelError(f"there is no slice {name!r}; there are {sizes}.")
        label = f"{chip.name}-{match[3]}"
        return cls(label if slices == 1 else f"{slices}x{label}", chip, chips * slices, slices)

    def devices(self, sharding: Sharding = "replicated") -> Devices:
        """Returns the chips, to compile for; they cannot run anything.

        Raises:
          ParallelError: libtpu is not installed.
        """
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
                topology_name=f"{self.chip.name}:{self.chip.shapes[self.chips // self.slices]}",
                **options,
            )
        chips: Any = description.devices
        devices = sorted(chips, key=lambda x: (x.process_index, x.id))
        return Devices(
            sharding, Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))
        )


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
