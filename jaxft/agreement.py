"""Compares recipe, images, versions and workdir between the processes of a run before it trains.

All processes exchange these keys (`jaxft.process_exchange`), in this order:

1. `facts`: recipe, package versions and data set facts, or the error that stopped the process.
2. `train digests`, `train names`, `val digests`, `val names`: only if the images differ, until one
   image is found. The error message then names it.
3. `file`, then `seen`: only if the facts are the same. Process 0 creates a file in the workdir, and
   each process looks for it there.
"""

import hashlib
import json
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import jax
import numpy as np
from etils import epath
from jax._src import distributed

from jaxft import recipe_file as recipes
from jaxft.data import Source, Splits
from jaxft.data.fingerprint import identity, record
from jaxft.data.source import is_multi_label
from jaxft.errors import ParallelError, first_of
from jaxft.process_exchange import end_round, exchange, num_processes, raise_error
from jaxft.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxft")
_DIGEST = "names, sizes or classes of {} images (digest)"  # name of a split's fingerprint
_MAX_DIFFERENCES = 8  # lines in one message
_MAX_NAMES = 20_000  # names that a process sends to the others, all of one class
_FILE_TIMEOUT = 10.0  # seconds until a network file system shows a new file on all hosts


def check_agreement(
    workdir: str | PathLike[str], recipe: Recipe, splits: Splits, device_cache_mib: int
) -> None:
    """Returns once all processes have the same recipe, images, versions and workdir.

    All processes must call it, or fail within `process_exchange.announced`.

    Raises:
      ParallelError: in every process, with the differences or with the error of another process.
    """
    if num_processes() == 1:
        return
    # Before the round, so that `announced` sends its errors.
    facts = {**_facts(recipe, splits), "device_cache_mib": device_cache_mib}
    try:
        facts_by_process = exchange("facts", facts)
        _check_facts(facts_by_process, splits)
        _check_shared(epath.Path(workdir))
    except Exception:  # not KeyboardInterrupt, which must end this process at once
        end_round(last=True)
        raise
    end_round(last=True)


def _facts(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """Returns the values that must be the same in all processes, by the name to print."""
    data = record(splits)
    facts: dict[str, Any] = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # jaxft may be a folder on the path, not installed
            facts[package] = version(package)
    facts |= {f"recipe: {name}": value for name, value in recipes.decisive(recipe).items()}
    facts["classes"] = data["classes"]
    facts["images with several labels"] = data["multi_label"]
    for split in ("train", "val"):
        facts[f"{split} images"] = data[split]
        for name, count in zip(data["classes"], data["per_class"][split], strict=True):
            facts[f"{split} images of class {name}"] = count
        facts[_DIGEST.format(split)] = data["fingerprint"][split][:16]
    return facts


def _check_facts(facts_by_process: Sequence[Mapping[str, Any]], splits: Splits) -> None:
    """Raises ParallelError if a process has failed or if the facts differ."""
    raise_error(facts_by_process)
    differences = []
    for name in dict.fromkeys(name for facts in facts_by_process for name in facts):
        values = [json.dumps(facts.get(name)) for facts in facts_by_process]
        differing = next((i for i, value in enumerate(values) if value != values[0]), None)
        if differing is not None:
            differences.append(
                f"{name}: {_shortened(values[0])} in process 0, "
                f"{_shortened(values[differing])} in process {differing}"
            )
    if differences:
        lines = [*first_of(differences, _MAX_DIFFERENCES), *_image_line(facts_by_process, splits)]
        raise ParallelError(
            "the processes of this run differ:\n  "
            + "\n  ".join(lines)
            + "\nGive all of them the same command, images and versions."
        )


def _shortened(value: str) -> str:
    return value if len(value) < 60 else f"{value[:56]} ..."


def _image_line(facts_by_process: Sequence[Mapping[str, Any]], splits: Splits) -> list[str]:
    """Returns a line that names an image which differs; none if the search for it fails.

    Exchanges keys, so all processes must call it with the same `facts_by_process`.
    """
    first, *others = facts_by_process
    if any(facts["classes"] != first["classes"] for facts in others):
        return []  # the classes are in the message already
    with suppress(jax.errors.JaxRuntimeError):  # a process has ended: raise what is known
        for split in ("train", "val"):
            name = _DIGEST.format(split)
            if any(facts[name] != first[name] for facts in others):
                line = _differing_image(split, getattr(splits, split))
                if line:
                    return [line]
    return []


def _differing_image(split: str, source: Source) -> str:
    """Returns a line that names an image of the first class whose images differ, or "".

    Sends a digest of each class first, and then the names of that class alone, since a data set may
    have millions of images.
    """
    try:
        names = _names_by_class(source)
    except Exception:  # a source may raise any type
        names = None
    digests = [_digest(class_names) for class_names in names] if names is not None else None
    received = exchange(f"{split} digests", {"digests": digests})
    digests_by_process = [values["digests"] for values in received]
    if names is None or None in digests_by_process:
        return ""
    differing = [
        (process, target)
        for process, of_process in enumerate(digests_by_process)
        for target, digest in enumerate(of_process)
        if digest != digests_by_process[0][target]
    ]
    if not differing:
        # Each class has the same images in the same order. Only the interleaving of the classes
        # differs.
        return ""
    process, target = differing[0]
    names_to_send = names[target] if len(names[target]) <= _MAX_NAMES else None
    received = exchange(f"{split} names", {"names": names_to_send})
    if received[0]["names"] is None or received[process]["names"] is None:
        return ""
    first_names, other_names = {*received[0]["names"]}, {*received[process]["names"]}
    lacks = [
        f"only process {owner} has {min(only)}"
        for owner, only in ((0, first_names - other_names), (process, other_names - first_names))
        if only
    ]
    text = ", ".join(lacks) or f"process {process} has them in another order than process 0"
    group = (*(f"of class {name}" for name in source.classes), "without a label")[target]
    return f"{split} images {group}: {text}"


def _digest(names: Sequence[str]) -> str:
    joined_names = "\n".join(names).encode("utf-8", "replace")
    return hashlib.sha256(joined_names).hexdigest()[:16]


def _names_by_class(source: Source) -> list[list[str]]:
    """Returns a name to print for each image, by class; the last list is of images without a label.

    `identity` returns path and size of an image file, separated by a NUL character; a digest in
    bytes of an image in memory; and otherwise any str or bytes that the source defines.
    """
    names: list[list[str]] = [[] for _ in (*source.classes, "without a label")]
    several = is_multi_label(source)
    for index, target in enumerate(source.targets):
        name = identity(source, index)
        text = name.hex()[:16] if isinstance(name, bytes) else name
        path, _, size = text.partition("\0")
        labels = np.flatnonzero(target).tolist() or [-1] if several else [target]
        for label in labels:
            names[label].append(f"{path} of {size} bytes" if size else path)
    return names


def _check_shared(workdir: epath.Path) -> None:
    """Raises ParallelError in every process unless all see the file that process 0 creates."""
    name, problem, is_new, is_shared = f".shared-{uuid.uuid4().hex}", "", False, False
    is_first = distributed.global_state.process_id == 0
    try:
        if is_first:
            try:
                is_new = not workdir.exists()
                workdir.mkdir(parents=True, exist_ok=True)
                (workdir / name).touch()
            except Exception as error:  # the clients of buckets may raise any type
                problem = f"{workdir} cannot be written: {_cause(error)}."
        created = exchange("file", {"name": name, "problem": problem})[0]  # by process 0
        problem = created["problem"] or _unseen(workdir, created["name"])
        if problem:
            raise ParallelError(problem)
        is_shared = True
    finally:
        if is_first:
            with suppress(Exception):  # an empty file does no harm
                (workdir / name).unlink(missing_ok=True)
                if is_new and not is_shared:
                    workdir.rmdir()


def _unseen(workdir: epath.Path, name: str) -> str:
    """Returns an error message if a process does not see the file in the workdir, or ""."""
    problem = ""
    try:
        if not _appears(workdir / name):
            problem = "does not see a file that process 0 has written there"
    except Exception as error:  # see `_check_shared`
        problem = f"cannot read it ({_cause(error)})"
    received = exchange("seen", {"problem": problem})
    for process, values in enumerate(received):
        if values["problem"]:
            return (
                f"{workdir} is not the same folder in all processes: process {process} "
                f"{values['problem']}. A run of several hosts needs a --workdir on a disk that "
                "they share, or in a bucket (gs://...)."
            )
    return ""


def _cause(error: Exception) -> str:
    """Returns the reason of an OSError without number and path, or type and message of others."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _appears(file: epath.Path) -> bool:
    """Returns whether the file exists; waits for it up to `_FILE_TIMEOUT`."""
    deadline = time.monotonic() + _FILE_TIMEOUT
    while not (exists := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return exists
