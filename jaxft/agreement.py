"""Compares recipe, images and versions between the processes of a run, before they train.

Everything travels through the key-value store of `jax.distributed`, not through a collective
computation: one that a process never joins, because it failed, would keep all others waiting.
"""

import hashlib
import json
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import jax
from etils import epath
from jax._src import distributed

from jaxft import recipe_file as recipes
from jaxft.data import Source, Splits
from jaxft.data.fingerprint import identity, record
from jaxft.errors import DataError, ParallelError, first_of
from jaxft.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxft")
_SHOWN = 8  # differences
_VISIBLE = 10.0  # seconds until a new file must have come through a network file system
_LAST_WORDS = 60.0  # seconds that a process which failed waits for the others to hear of it
_LONG = 60.0  # seconds until a line names the processes that are missing
_COMPARED = 20_000  # names of images that one process sends to the others
_DIGEST = "names, sizes or classes of {} images (digest)"
_SLICE = 2000  # milliseconds of one wait, after which Python may handle a signal

_round = 0  # of comparisons: one for each run of this process


@contextmanager
def announced() -> Iterator[None]:
    """Sends an error within the block to the other processes, unless `reach` was called before.

    They raise ParallelError in their call of `reach`, instead of waiting for this process. So does
    an exit of the program, as for an option that there is not.
    """
    begun = _round
    try:
        yield
    except (Exception, SystemExit) as error:
        if begun == _round and _count() > 1:
            with suppress(jax.errors.JaxRuntimeError):
                line = f"{type(error).__name__}: {error}"
                if isinstance(error, SystemExit):
                    line = f"it has ended with exit code {error.code}, and its output tells why."
                _exchange("facts", {"error": line}, patience=_LAST_WORDS)
            _end_round()
        raise


def reach(workdir: str | PathLike[str], recipe: Recipe, splits: Splits) -> None:
    """Returns once all processes hold the same recipe, images, versions and workdir.

    All processes must call it, or fail within `announced`.

    Raises:
      ParallelError: in every process, with the differences, or with another process's error.
    """
    if _count() == 1:
        return
    try:
        facts = _exchange("facts", _facts(recipe, splits))
        _compare(facts, partial(_first_other_image, splits, facts))
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
        facts[_DIGEST.format(split)] = images["fingerprint"][split][:16]
    return facts


def _compare(facts: list[dict[str, Any]], first_other_image: Callable[[], list[str]]) -> None:
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
        raise ParallelError(
            "the processes of this run differ:\n  "
            + "\n  ".join([*first_of(lines, _SHOWN), *first_other_image()])
            + "\nGive all of them the same command, images and versions."
        )


def _first_other_image(splits: Splits, facts: list[dict[str, Any]]) -> list[str]:
    """Returns a line that names an image which two processes do not share, where that is cheap.

    All processes hold the same `facts`, and take the same way here.
    """
    if any(each["classes"] != facts[0]["classes"] for each in facts):
        return []
    for split in ("train", "val"):
        if len({each[_DIGEST.format(split)] for each in facts}) > 1:
            with suppress(jax.errors.JaxRuntimeError, DataError):
                return _other_image(split, getattr(splits, split))
    return []


def _other_image(split: str, source: Source) -> list[str]:
    names: list[list[str]] = [[] for _ in source.classes]
    for index, target in enumerate(source.targets):
        name = identity(source, index)
        text = name.hex()[:16] if isinstance(name, bytes) else name
        path, _, size = text.partition("\0")
        names[target].append(f"{path} of {size} bytes" if size else path)
    digests = [hashlib.sha256("\n".join(each).encode("utf-8", "replace")) for each in names]
    by_process = [
        each["digests"]
        for each in _exchange(
            "digests", {"digests": [x.hexdigest()[:16] for x in digests]}, patience=_LAST_WORDS
        )
    ]
    other, target = next(
        (process, target)
        for process, theirs in enumerate(by_process)
        for target, digest in enumerate(theirs)
        if digest != by_process[0][target]
    )
    if len(names[target]) > _COMPARED:
        names[target] = []
    both = _exchange("names", {"names": names[target]}, patience=_LAST_WORDS)
    first, second = ({*both[process]["names"]} for process in (0, other))
    if not first or not second:
        return []
    alone = [
        f"only process {process} has {min(names)}"
        for process, names in ((0, first - second), (other, second - first))
        if names
    ]
    found = ", ".join(alone) or f"other order in process {other} than in process 0"
    return [f"{split} images of class {source.classes[target]}: {found}"]


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
    """Returns the value of each process; waits for all of them, up to `patience` seconds.

    Prints a line if that takes long: a process may be alive and yet never come.
    """
    client, key = distributed.global_state.client, f"jaxft/{_round}/{name}"
    assert client is not None  # as there are several processes
    client.key_value_set(f"{key}/{distributed.global_state.process_id}", json.dumps(value))
    begun, remarked = time.monotonic(), False
    values: list[dict[str, Any]] = []
    while len(values) < _count():
        try:
            found = client.blocking_key_value_get(f"{key}/{len(values)}", _SLICE)
            values.append(json.loads(found))
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - begun
            if "DEADLINE_EXCEEDED" not in str(error) or waited > patience:
                raise
            if waited > _LONG and not remarked:
                remarked = True
                come = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
                absent = ", ".join(str(i) for i in range(_count()) if i not in come)
                print(
                    f"Waiting for process {absent} of {_count()} to open its images and weights. "
                    "If it never will, end it.",
                    file=sys.stderr,
                )
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
