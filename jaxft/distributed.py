"""Many devices, of one process or of several: who takes part, and what lies where.

A run is one program on one mesh of all devices. It computes the same on any number of them: the
batch is divided among the devices, parameters are copied to or divided among them, and the compiler
adds what they have to tell each other (GSPMD, Xu et al. 2021, arXiv:2105.04663).
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Thread
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft import lost_process, rendezvous
from jaxft.errors import ParallelError

T = TypeVar("T")

Sharding = Literal["replicated", "fsdp"]
"""`replicated`: each device has all parameters and all of the optimizer's state.
`fsdp`: large ones are divided among the devices, and gathered where a step uses them.
"""

LARGE = 2**18
"""Elements from which `fsdp` divides an array, 1 MiB of float32: below, latency is all it buys."""

_BATCH = "batch"  # the mesh's one axis
_PATIENCE = 50.0  # seconds for all processes to come; a minute with the start and end of Python
_FOREVER = 10**6
_ANSWER_BYTES = 4096  # of a string that process 0 sends to the others
_SILENCE = 60  # seconds after which a process that sends no heartbeat counts as lost
_PARTING = 20  # seconds that a process which ends waits for the others: after an error, in vain


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others of its run; to be called before jax is used at all.

    coordinator: HOST:PORT at which process 0 is reached; the port is any that is free there.
    processes: how many there are, of one or several hosts, all with equally many devices.
    process: which one this is, from 0.

    Without arguments, these are found out where jax knows how to (TPU VMs, Slurm, Open MPI,
    Kubernetes); where there is nothing to join, or `processes` is 1, this process is the run.
    SIGTERM stays the program's own. Where one process ends before the others, they are ended soon
    after: an error in one leaves none behind, and a run ends with a `barrier`.

    Raises:
      ParallelError: arguments that do not fit, in this process or among all (a number that came
        twice), or not all processes have come within a minute.
    """
    if processes == 1 or jax.distributed.is_initialized():
        return
    if coordinator is None and processes is None and process is None:
        _join("this cluster", "Start the program on each of its hosts; `--processes 1` runs alone.")
        return
    if coordinator is None or processes is None or process is None:
        raise ParallelError(
            f"coordinator is {coordinator}, processes {processes}, process {process}: several "
            "processes need all three, each its own number; a single one, none of them."
        )
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or int(port[1]) > 65535:
        raise ParallelError(f"coordinator is {coordinator!r}; it must be HOST:PORT.")
    if not 0 <= process < processes:
        raise ParallelError(
            f"process is {process}; of {processes} the first is 0 and the last {processes - 1}."
        )
    rendezvous.meet(coordinator, processes, process, patience=_PATIENCE)
    _join(
        f"the {processes} processes at {coordinator}",
        f"Start each with a --process of its own, from 0 to {processes - 1}.",
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",  # or Slurm's would leave but one GPU to see
    )


def check_devices() -> None:
    """Raises ParallelError where the devices that JAX was asked for are not there."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without the plugin for CUDA
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        line = str(error).partition("\n")[0] or "there is no plugin for it."
        raise ParallelError(
            f"JAX cannot use {asked or 'its devices'!r}, as JAX_PLATFORMS asks: {line} Install "
            "jaxft's extra for the device ('.[cuda]' or '.[tpu]'), or set JAX_PLATFORMS=cpu."
        ) from error


def _join(whom: str, advice: str, **arguments: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, to let Orbax save and end the processes at a step of its choice.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=_FOREVER,
                shutdown_timeout_seconds=_PARTING,
                heartbeat_timeout_seconds=_SILENCE,
            )
        except Exception as error:
            failures.append(error)

    # jax's own timeout aborts the process, in C++ with a stack trace. In a thread it can be left
    # behind, with the error raised here.
    thread = Thread(target=join, name="jaxft-join", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        raise ParallelError(
            f"cannot join {whom}: after {_PATIENCE:.0f} s not all have come. {advice}"
        )
    for error in failures:
        if str(error) == "coordinator_address should be defined." and not arguments:
            return  # there is no cluster
        raise ParallelError(f"cannot join {whom}: {error}") from error
    lost_process.end_clearly()
    with suppress(RuntimeError):  # `check_devices` reports it
        jax.devices()  # needs all processes: now, before any of them can fail


def is_main_process() -> bool:
    """Returns True in process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns True if `flag` is True in any process.

    A collective: every process must call it at the same point of the program. It waits for the
    devices; a run of one process returns at once.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(tree: T) -> T:
    """Returns process 0's arrays in every process, as NumPy arrays. A collective."""
    if jax.process_count() == 1:
        return tree
    return cast(T, jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree)))


def ask_main_process(question: Callable[[], str]) -> str:
    """Calls `question` in process 0 and returns its answer in every process. A collective.

    Decisions on the file system go through here, so that all processes take the same branch: if
    process 0 alone raised an error, the others would wait for it.

    Args:
      question: returns a string of at most 4096 bytes in UTF-8; longer ones are cut for the others.
    """
    answer = question() if is_main_process() else ""
    if jax.process_count() == 1:
        return answer
    sent = np.frombuffer(answer.encode()[:_ANSWER_BYTES].ljust(_ANSWER_BYTES, b"\0"), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8)
    return answer or received.tobytes().rstrip(b"\0").decode(errors="ignore")


def _all_devices() -> Mesh:
    # Not jax.make_mesh, which orders a TPU's devices by its wiring: a process would then not
    # have one run of rows of the batch, and what a row is would depend on the number of hosts.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (_BATCH,), axis_types=(AxisType.Auto,))


@dataclass(frozen=True)
class Devices:
    """The devices of a run, by default all there are, and how its arrays lie on them.

    Hashable: it may be a static part of a compiled step, of which `constrain` keeps the state
    where it is.

        devices = Devices("fsdp")
        state = devices.put(state)
        state = step(state, devices.batch(batch))  # at its end: return devices.constrain(state)

    Raises ParallelError if the processes have unequal numbers of devices.
    """

    sharding: Sharding = "replicated"
    mesh: Mesh = field(default_factory=_all_devices)

    def __post_init__(self) -> None:
        counts = Counter(device.process_index for device in self.mesh.devices.flat)
        if len(set(counts.values())) > 1:
            raise ParallelError(
                "each process must have as many devices as any other, and they have "
                f"{', '.join(str(counts[process]) for process in sorted(counts))}."
            )

    def __len__(self) -> int:
        return int(self.mesh.size)

    def rows(self, batch_size: int) -> int:
        """The rows of an array of `batch_size` examples: so many that each device has as many."""
        return -(-batch_size // len(self)) * len(self)

    @property
    def shard(self) -> tuple[int, int]:
        """Which of how many equal parts of each batch this process reads."""
        return jax.process_index(), jax.process_count()

    def batch(self, part: T, *, stacked: bool = False) -> T:
        """The batch of which each process has its `part`: NumPy arrays [b ...], divided by rows.

        `stacked` ones are [n b ...].
        """
        rows = self._rows(stacked)
        if rows.is_fully_addressable:
            return jax.device_put(part, rows)  # all arrays at once
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), part)

    def abstract_batch(self, shapes: T, *, stacked: bool = False) -> T:
        """Shapes, types and places of a whole batch, as `abstract` gives those of parameters."""
        rows = self._rows(stacked)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes)

    def _rows(self, stacked: bool) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * stacked, _BATCH))

    def shardings(self, tree: Any) -> Any:
        """Where each leaf belongs; `tree` is of anything that has a shape.

        With `fsdp`, those of `LARGE` elements and more are divided along their largest dimension
        that has equal parts for all devices. A moment so lies as its parameter does.
        """

        def place(leaf: Any) -> NamedSharding:
            shape = np.shape(leaf)
            fitting = [axis for axis, size in enumerate(shape) if size % len(self) == 0]
            if self.sharding == "replicated" or np.prod(shape) < LARGE or not fitting:
                return NamedSharding(self.mesh, PartitionSpec())
            widest = max(fitting, key=lambda axis: (shape[axis], axis))
            return NamedSharding(self.mesh, PartitionSpec(*[None] * widest, _BATCH))

        return jax.tree.map(place, tree)

    def put(self, tree: T) -> T:
        """The arrays where they belong; every process has the same values, or its part of them.

        What lies right already is not copied: a step that donates it takes it from `tree` too.
        """

        def put(leaf: Any, place: NamedSharding) -> jax.Array:
            there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
            if there or place.is_fully_addressable:
                return jax.device_put(leaf, place)
            # device_put would send each array around, to see that all processes have the same.
            return jax.make_array_from_callback(leaf.shape, place, np.asarray(leaf).__getitem__)

        return jax.tree.map(put, tree, self.shardings(tree))

    def constrain(self, tree: T) -> T:
        """Within a compiled function: the arrays stay, or come, where they belong."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def gather(self, tree: T) -> T:
        """Within a compiled function: every device gets the whole arrays."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def spread(self, parts: jax.Array) -> jax.Array:
        """Within a compiled function: parts of a batch [n b ...], each as `batch` divides one.

        Each is padded to equal shares for the devices.
        """
        count = parts.shape[1]
        padding = [(0, 0), (0, self.rows(count) - count), *[(0, 0)] * (parts.ndim - 2)]
        # By way of whole copies: the compiler finds no other, and warns of it unless told so.
        parts = self.gather(parts)
        place = NamedSharding(self.mesh, PartitionSpec(None, _BATCH))
        return jax.lax.with_sharding_constraint(jnp.pad(parts, padding), place)

    def abstract(self, tree: Any) -> Any:
        """The tree's shapes, types and places, as Orbax restores and `jit(...).lower` compiles."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            self.shardings(tree),
        )

    def host(self, tree: Any) -> Any:
        """The whole arrays, in NumPy's memory in every process; all must ask."""
        if jax.process_count() > 1:
            tree = _copier(NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.device_get(tree)


@lru_cache(maxsize=1)
def _copier(place: NamedSharding) -> Callable[[T], T]:
    return jax.jit(lambda tree: tree, out_shardings=place)
