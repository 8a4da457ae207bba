"""Devices of a run: the placement of batches, parameters and states on one mesh.

A run is one program on one mesh of all devices. Its result does not depend on their number: the
batch is divided among the devices, parameters are copied to or divided among them, and the compiler
inserts the communication (GSPMD, Xu et al. 2021, arXiv:2105.04663).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.errors import ParallelError

T = TypeVar("T")

Sharding = Literal["replicated", "fsdp"]
"""Placement of parameters and optimizer state.

- `replicated`: each device holds all of them.
- `fsdp`: large arrays are divided among the devices and gathered where a step uses them.
"""

LARGE = 2**18
"""Minimum number of elements of an array that `fsdp` divides: 1 MiB of float32. Dividing smaller
arrays would save no memory worth the latency."""

BATCH_AXIS = "batch"  # the only axis of the mesh


def cache_share(memory: float) -> int:
    """Returns the MiB for cached features of a device with this memory in bytes: a quarter."""
    return int(memory / 4) // 2**20


def _all_devices() -> Mesh:
    # Not jax.make_mesh, which orders a TPU's devices by its wiring. Each process must hold
    # consecutive rows of the batch, so that the rows do not depend on the number of hosts.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def _slice_index(device: Any) -> int:
    return int(getattr(device, "slice_index", None) or 0)


@dataclass(frozen=True)
class Devices:
    """Devices of a run, and the placement of arrays on them.

    Hashable, so that it can be a static argument of a compiled step.

    Attributes:
      sharding: placement of parameters and optimizer state.
      mesh: mesh with the single axis "batch"; all devices by default.
      cache_mib: memory of each device for cached features, in MiB.

    Raises:
      ParallelError: the processes have different numbers of devices.

    Example:
        devices = Devices("fsdp")
        state = devices.put(state)
        state = step(state, devices.batch(batch))  # ends with: return devices.constrain(state)
    """

    sharding: Sharding = "replicated"
    mesh: Mesh = field(default_factory=_all_devices)
    cache_mib: int = 0

    def __post_init__(self) -> None:
        owners = {"processes": lambda device: device.process_index, "slices": _slice_index}
        for name, owner in owners.items():
            counts = Counter(map(owner, self.mesh.devices.flat))
            if len(set(counts.values())) > 1:
                raise ParallelError(
                    f"all {name} must have the same number of devices, but they have "
                    f"{', '.join(str(counts[index]) for index in sorted(counts))}."
                )

    def __len__(self) -> int:
        return int(self.mesh.size)

    def rows(self, batch_size: int) -> int:
        """Returns `batch_size` rounded up to a multiple of the number of devices."""
        return -(-batch_size // len(self)) * len(self)

    @property
    def platform(self) -> str:
        """Platform of the devices: `cpu`, `tpu`, `cuda` or `rocm`."""
        device = self.mesh.devices.flat[0]
        if device.platform == "gpu":
            return "rocm" if "rocm" in device.client.platform_version else "cuda"
        return str(device.platform)

    def with_cache(self, cache_mib: int | None) -> "Devices":
        """Returns the devices with this memory for cached features; None: a share of the memory.

        Depends on this process's devices; `jaxft.agreement` compares the result with the others'.
        """
        if cache_mib is None:
            stats = jax.local_devices()[0].memory_stats() if self.platform != "cpu" else None
            cache_mib = cache_share((stats or {}).get("bytes_limit", 0))
        return replace(self, cache_mib=cache_mib)

    @property
    def slices(self) -> int:
        """Number of TPU slices; 1 for other devices. Communication between slices is slow."""
        return len(set(map(_slice_index, self.mesh.devices.flat)))

    @property
    def shard(self) -> tuple[int, int]:
        """`(index, count)`: this process reads part `index` of `count` equal parts of a batch."""
        return jax.process_index(), jax.process_count()

    def replicas(self, count: int) -> int | Mesh:
        """Returns `count` groups of consecutive devices as a mesh; see `jaxft.models.Model.apply`.

        Returns `count` itself if it is 1, or if the devices cannot be divided into such groups.
        """
        return count if count == 1 or len(self) % count else self._groups(count)

    def _groups(self, count: int) -> Mesh:
        groups = self.mesh.devices.reshape(count, -1)
        return Mesh(groups, ("group", BATCH_AXIS), axis_types=(AxisType.Auto,) * 2)

    def batch(self, part: T, *, stacked: bool = False) -> T:
        """Puts a batch on the devices, divided by rows.

        Args:
          part: this process's rows, NumPy arrays [b ...].
          stacked: whether the arrays are several batches, [n b ...].

        Returns:
          Global arrays with the rows of all processes.
        """
        sharding = self._row_sharding(stacked)
        if sharding.is_fully_addressable:
            return jax.device_put(part, sharding)  # all arrays in one call
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), part)

    def abstract_batch(self, shapes: T, *, stacked: bool = False) -> T:
        """Returns shapes, types and shardings of a global batch, to compile ahead of time."""
        sharding = self._row_sharding(stacked)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    def _row_sharding(self, stacked: bool) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * stacked, BATCH_AXIS))

    def shardings(self, tree: Any) -> Any:
        """Returns the sharding of each leaf; only the shapes of the leaves are read.

        With `fsdp`, arrays of at least `LARGE` elements are divided along the largest dimension
        that the number of devices divides. The moments of an optimizer have the shape of their
        parameter and so its sharding.
        """

        def leaf_sharding(leaf: Any) -> NamedSharding:
            shape = np.shape(leaf)
            divisible = [axis for axis, size in enumerate(shape) if size % len(self) == 0]
            if self.sharding == "replicated" or np.prod(shape) < LARGE or not divisible:
                return NamedSharding(self.mesh, PartitionSpec())
            largest = max(divisible, key=lambda axis: (shape[axis], axis))
            return NamedSharding(self.mesh, PartitionSpec(*[None] * largest, BATCH_AXIS))

        return jax.tree.map(leaf_sharding, tree)

    def put(self, tree: T) -> T:
        """Puts arrays on the devices according to `shardings`.

        Every process must pass the same values, or global arrays. An array that is already in place
        is not copied, so a step that donates the result also deletes the leaf of `tree`.
        """

        def put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
            is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
            if is_global or sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            # device_put would send each array to all processes, to compare the values.
            return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)

        return jax.tree.map(put_leaf, tree, self.shardings(tree))

    def constrain(self, tree: T) -> T:
        """Constrains arrays to `shardings`. Call it within a compiled function."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def replicate(self, tree: T) -> T:
        """Copies whole arrays to every device. Call it within a compiled function."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def gather_params(self, params: T, kernel_dtype: str | None = None) -> T:
        """Gathers divided parameters before they are used. Call it within a compiled function.

        Left alone, the compiler divides the products instead, in loops that are slower.

        Args:
          params: parameters, divided as `shardings` says.
          kernel_dtype: type in which kernels of convolutions `[h w i o]` travel, if the network
            casts them to it.
        """
        if self.sharding == "replicated":
            return params

        def gather(leaf: jax.Array) -> jax.Array:
            is_kernel = kernel_dtype and leaf.ndim == 4
            return self.replicate(leaf.astype(kernel_dtype) if is_kernel else leaf)

        return jax.tree.map(gather, params)

    def stack_parts(
        self, batch: jax.Array, count: int, size: int, *, pad: bool = True
    ) -> jax.Array:
        """Splits a batch and divides each part among the devices.

        Call it within a compiled function. If each device holds whole parts, or the rows of one
        part only, it sends and receives its share once. Otherwise it receives the whole batch.

        Args:
          batch: rows of a batch [b ...], divided among the devices.
          count: number of parts.
          size: rows of a part, which are consecutive.
          pad: whether to zero-pad parts that cannot be divided equally. If False, each device
            receives all of their rows.

        Returns:
          The parts [count rows ...], where `rows` is `self.rows(size)`, or `size` without padding.
        """
        parts = batch[: count * size].reshape(count, size, *batch.shape[1:])
        groups, larger = sorted((count, len(self)))
        if count * size == len(batch) and size % len(self) == 0 and larger % groups == 0:
            # The parts before any exchange; the compiler would copy the whole batch.
            before = NamedSharding(self._groups(groups), PartitionSpec("group", BATCH_AXIS))
            parts = jax.lax.with_sharding_constraint(parts, before)
        else:
            # The compiler has no better way, and warns unless the copies are explicit.
            parts = self.replicate(parts)
            if size % len(self) and not pad:
                return parts
            padding = [(0, 0), (0, self.rows(size) - size), *[(0, 0)] * (parts.ndim - 2)]
            parts = jnp.pad(parts, padding)
        sharding = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXIS))
        return jax.lax.with_sharding_constraint(parts, sharding)

    def abstract(self, tree: Any) -> Any:
        """Returns shapes, types and shardings, for `jit(...).lower` and for Orbax to restore."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def lower(self, function: Any, *arguments: Any) -> jax.stages.Lowered:
        """Lowers a jitted function for arguments of these shapes, to compile it for the devices.

        The devices may be those of a `jaxft.topology.Topology`, which are not in this machine.
        """
        # Without the devices, jax would lower for the CPU. Those of this machine it knows best.
        platforms = (self.platform,) if self.platform in ("tpu", "cuda") else None
        return function.trace(*arguments).lower(lowering_platforms=platforms)

    def host(self, tree: Any) -> Any:
        """Returns the whole arrays as NumPy arrays in every process. A collective."""
        if jax.process_count() > 1:
            tree = _replicator(NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.device_get(tree)


@lru_cache(maxsize=1)
def _replicator(sharding: NamedSharding) -> Callable[[T], T]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)
