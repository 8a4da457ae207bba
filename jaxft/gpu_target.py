"""NVIDIA GPUs as XLA describes them, to compile for cards that are not there.

The `cuda` extra compiles for a card without one. It cannot try the algorithms of cuDNN and cuBLAS,
as it does on a card (autotuning), and takes their defaults.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from jaxft.errors import ParallelError


@dataclass(frozen=True)
class GpuTarget:
    """Numbers of a GPU's architecture that XLA's compiler reads.

    They are in NVIDIA's white papers of the architecture, and in the table of compute capabilities
    in the CUDA programming guide.

    Attributes:
      compute_capability: such as 9.0. XLA may use all features of its architecture.
      multiprocessors: number of streaming multiprocessors.
      float32_units: units for float32 in a multiprocessor.
      shared_memory: KiB of shared memory of a multiprocessor.
      cache: MiB of L2 cache.
      clock: of the multiprocessors when they boost, GHz.
    """

    compute_capability: tuple[int, int]
    multiprocessors: int
    float32_units: int
    shared_memory: int
    cache: int
    clock: float

    def description(self, name: str, memory: int, bandwidth: float) -> str:
        """Returns the text of a `GpuTargetConfigProto` of XLA."""
        major, minor = self.compute_capability
        device = {
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": 2048,
            **_per_axis("thread_dim_limit", 1024, 1024, 64),
            **_per_axis("block_dim_limit", 2**31 - 1, 2**16 - 1, 2**16 - 1),
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "shared_memory_per_block": 48 * 2**10,
            "shared_memory_per_block_optin": (self.shared_memory - 1) * 2**10,
            "shared_memory_per_core": self.shared_memory * 2**10,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.float32_units,
            "l2_cache_size": self.cache * 2**20,
            "clock_rate_ghz": self.clock,
            "device_memory_size": memory,
            "memory_bandwidth": int(bandwidth),
        }
        features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return (
            f"gpu_device_info {{ {' '.join(f'{key}: {value}' for key, value in device.items())} "
            f"cuda_compute_capability {{ major: {major} minor: {minor} "
            f"feature_extension: {features} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } '
            f'device_description_str: "{name}"'
        )


def gpus(name: str, arrangement: str, description: str) -> Any:
    """Returns the devices of a topology of GPUs.

    Args:
      name: name of the topology, for errors.
      arrangement: `SLICESxHOSTSxGPUS`, GPUs on each host.
      description: see `GpuTarget.description`.

    Raises:
      ParallelError: jax's plugin for CUDA is not installed, or does not work.
    """
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ParallelError(
            f"compiling for {name} needs jax's plugin for CUDA: pip install 'jaxft[cuda]'. No GPU "
            "is needed."
        )
    try:
        return topologies.get_topology_desc(
            "", platform="cuda", topology=arrangement, target_config=description
        ).devices
    except (NotImplementedError, RuntimeError) as error:
        raise ParallelError(
            f"jax's plugin for CUDA cannot compile for {name}: {error}. Install it in the version "
            "of jaxlib (pip install 'jaxft[cuda]'), and set JAX_PLATFORMS=cpu."
        ) from error


def _per_axis(name: str, *limits: int) -> dict[str, int]:
    return {f"{name}_{axis}": limit for axis, limit in zip("xyz", limits, strict=True)}
