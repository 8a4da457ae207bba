"""Processes of a run: joining them, their collectives and barriers.

`jaxft.devices` places arrays on the devices of all processes.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft import lost_process, rendezvous
from jaxft.errors import ParallelError

T = TypeVar("T")

_JOIN_TIMEOUT = 50.0  # seconds; a minute together with the start and the end of Python
_NEVER = 10**6  # seconds
_ANSWER_BYTES = 4096  # of a string that process 0 sends to the others
_HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as lost
_SHUTDOWN_TIMEOUT = 20  # seconds that an ending process waits for the others


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the other processes of its run. Call it before any other use of JAX.

    Without arguments, JAX detects the cluster (TPU VMs, Slurm, Open MPI, Kubernetes), in which the
    environment variable `JAX_COORDINATOR_PORT` sets the port of process 0. Without a cluster, or
    with `processes=1`, this process is the whole run.

    The program's SIGTERM handler stays in place. If a process ends early, the others are ended soon
    after; end a run with `barrier`, so that the first process to finish does not end the others.

    Args:
      coordinator: HOST:PORT of process 0; any free port.
      processes: number of processes, on one or several hosts, each with the same number of devices.
      process: index of this process, from 0.

    Raises:
      ParallelError: the arguments are wrong or contradict another process, or not all
        processes joined within a minute.
    """
    if processes == 1 or jax.distributed.is_initialized():
        return
    if coordinator is None and processes is None and process is None:
        _join("this cluster", "Start the program on each of its hosts; `--processes 1` runs alone.")
        return
    if coordinator is None or processes is None or process is None:
        raise ParallelError(
            f"coordinator is {coordinator}, processes {processes}, process {process}: several "
            "processes need all three, with a different process number for each; a single process "
            "needs none of them."
        )
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or int(port[1]) > 65535:
        raise ParallelError(f"coordinator is {coordinator!r}; it must be HOST:PORT.")
    if not 0 <= process < processes:
        raise ParallelError(
            f"process is {process}; with {processes} processes it must be from 0 to "
            f"{processes - 1}."
        )
    rendezvous.meet(coordinator, processes, process, timeout=_JOIN_TIMEOUT)
    _join(
        f"the {processes} processes at {coordinator}",
        f"Start each with a different --process, from 0 to {processes - 1}.",
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",  # Slurm's would leave each process a single GPU
    )


def check_devices() -> None:
    """Raises ParallelError if the devices that JAX_PLATFORMS names are missing."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without the plugin for CUDA
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = str(error).partition("\n")[0] or "there is no plugin for it."
        raise ParallelError(
            f"JAX cannot use {platforms or 'its devices'!r}, as JAX_PLATFORMS asks: {reason} "
            "Install jaxft's extra for the device ('.[cuda]' or '.[tpu]'), or set "
            "JAX_PLATFORMS=cpu."
        ) from error


def _join(group: str, advice: str, **arguments: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The preemption service would catch SIGTERM, and let Orbax choose the step at which to save.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=_NEVER,
                shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
        except Exception as error:
            failures.append(error)

    # JAX's timeout aborts the process, in C++ with a stack trace. Instead, this thread is abandoned
    # after the timeout and the error is raised here.
    thread = Thread(target=join, name="jaxft-join", daemon=True)
    thread.start()
    thread.join(_JOIN_TIMEOUT)
    if thread.is_alive():
        raise ParallelError(
            f"cannot join {group}: after {_JOIN_TIMEOUT:.0f} s some processes are missing. {advice}"
        )
    for error in failures:
        if str(error) == "coordinator_address should be defined." and not arguments:
            return  # there is no cluster
        raise ParallelError(f"cannot join {group}: {error}") from error
    lost_process.install_abort_handler()
    with suppress(RuntimeError):  # `check_devices` reports it
        jax.devices()  # needs all processes, so call it before any of them can fail


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
