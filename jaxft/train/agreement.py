"""Processes of a run compare what they have opened, before the first of them trains.

Everything travels through the key-value store of `jax.distributed`, not through a collective
computation: one that a process never joins, because it failed, would keep all others waiting.
"""

import json
import platform
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import jax
from etils import epath
from jax._src import distributed

from jaxft import recipe as recipes
from jaxft.data import Splits
from jaxft.data.fingerprint import record
from jaxft.errors import ParallelError
from jaxft.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxft")
_SHOWN = 8  # differences
_VISIBLE = 10.0  # seconds until a new file must have come through a network file system
_LAST_WORDS = 60.0  # seconds that a process which failed waits for the others to hear of it
_SLICE = 2000  # milliseconds of one wait, after which Python may handle a signal

_round = 0  # of comparisons: one for each run of this process


@contextmanager
def announced() -> Iterator[None]:
    """Sends an error within the block to the other processes, unless `reach` was called before.

    They raise ParallelError in their call of `reach`, instead of waiting for this process.
    """
    begun = _round
    try:
        yield
    except Exception as error:
        if begun == _round and _count() > 1:
            with suppress(jax.errors.JaxRuntimeError):
                line = f"{type(error).__name__}: {error}"
                _exchange("facts", {"error": line}, patience=_LAST_WORDS)
            _end_round()
        raise


def reach(workdir: str | PathLike[str], recipe: Recipe, splits: Splits) -> None:
    """Returns once all processes hold the same recipe, images, versions and workdir.

    All processes must call it, or fail within `announced`.

    Raises:
      ParallelError: in every process, with what differs; or with another process's error.
    """
    if _count() == 1:
        return
    try:
        _compare(_exchange("facts", _facts(recipe, splits)))
        _share(epath.Path(workdir))
    finally:
        _end_round()


def _facts(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    images = record(splits)
    facts: dict[str, Any] = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a folder on the path, not installed
            facts[package] = version(package)
    facts |= {f"recipe: {name}": value for name, value in recipes.decisive(recipe).items()}
    facts["classes"] = images["classes"]
    for split in ("train", "val"):
        facts[f"{split} images"] = images[split]
        for name, count in zip(images["classes"], images["per_class"][split], strict=True):
            facts[f"{split} images of class {name}"] = count
        facts[f"names, sizes or classes of {split} images (digest)"] = images["fingerprint"][split]
    return facts


def _compare(facts: list[dict[str, Any]]) -> None:
    for process, each in enumerate(facts):
        if "error" in each:
            raise ParallelError(f"process {process} of this run has failed: {each['error']}")
    lines = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [json.dumps(each.get(name)) for each in facts]
        if process := next((i for i, value in enumerate(values) if value != values[0]), 0):
            here, there = (value if len(value) < 60 else f"{value[:56]} ..." for value in
                           (values[0], values[process]))  # fmt: skip
            lines.append(f"{name}: {here} in process 0, {there} in process {process}")
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ParallelError(
            "the processes of this run differ:\n  "
            + "\n  ".join(lines[:_SHOWN] + more)
            + "\nGive all of them the same command, images and versions."
        )


def _share(workdir: epath.Path) -> None:
    """Raises ParallelError in every process unless all see the first one's file in the workdir."""
    name, problem = f".shared-{uuid.uuid4().hex}", ""
    first = distributed.global_state.process_id == 0
    if first:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / name).touch()
        except OSError as error:
            problem = f"{workdir} cannot be written: {error.strerror or error}."
    written = _exchange("file", {"name": name, "problem": problem})[0]
    if not written["problem"]:
        seen = _sees(workdir / written["name"])
        blind = [i for i, each in enumerate(_exchange("seen", {"seen": seen})) if not each["seen"]]
        if blind:
            problem = (
                f"{workdir} is not the same folder in all processes: what process 0 writes there, "
                f"process {blind[0]} does not see. A run of several hosts needs a --workdir on a "
                "disk that they share, or in a bucket (gs://...)."
            )
    if first:
        with suppress(OSError):
            (workdir / name).unlink(missing_ok=True)
            if problem:
                workdir.rmdir()  # if nothing else is there
    if problem or written["problem"]:
        raise ParallelError(problem or written["problem"])


def _sees(file: epath.Path) -> bool:
    late = time.monotonic() + _VISIBLE
    while not (found := file.exists()) and time.monotonic() < late:
        time.sleep(0.2)
    return found


def _exchange(
    name: str, value: Mapping[str, Any], *, patience: float = float("inf")
) -> list[dict[str, Any]]:
    """Returns the value of each process; waits for all of them, up to `patience` seconds."""
    client, key = distributed.global_state.client, f"jaxft/{_round}/{name}"
    assert client is not None  # as there are several processes
    client.key_value_set(f"{key}/{distributed.global_state.process_id}", json.dumps(value))
    late = time.monotonic() + patience
    values: list[dict[str, Any]] = []
    while len(values) < _count():
        try:
            found = client.blocking_key_value_get(f"{key}/{len(values)}", _SLICE)
            values.append(json.loads(found))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > late:
                raise
    return values


def _end_round() -> None:
    """Waits until all processes have read each other's values: one that ends ends the others."""
    global _round
    client = distributed.global_state.client
    assert client is not None
    with suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(f"jaxft/{_round}/read", 10_000)
    _round += 1


def _count() -> int:
    return int(distributed.global_state.num_processes or 1)
