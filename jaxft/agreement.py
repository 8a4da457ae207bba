"""Compares recipe, images, versions and workdir between the processes of a run before it trains.

Each process writes values to the key-value store of `jax.distributed` and reads the values of all
others. A collective computation would not do: a process that fails before it joins would keep all
others waiting.

One comparison is a round. All processes exchange these keys, in this order:

1. `facts`: recipe, package versions and data set facts, or the error that stopped the process.
2. `train digests`, `train names`, `val digests`, `val names`: only if the images differ, until one
   image is found. The error message then names it.
3. `file`, then `seen`: only if the facts are the same. Process 0 creates a file in the workdir, and
   each process looks for it there.

Every process must exchange the same keys, since each exchange waits for all of them. The decision
to exchange a key therefore depends only on values that all processes have received, and a process
that cannot compute its value sends a message or None instead. A round ends at a barrier, because a
process that exits also ends the others: none may exit before the others have read its values.
"""

import hashlib
import json
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from jaxft.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxft")
_DIGEST = "names, sizes or classes of {} images (digest)"  # name of a split's fingerprint
_MAX_DIFFERENCES = 8  # lines in one message
_MAX_NAMES = 20_000  # names that a process sends to the others, all of one class

# In seconds.
_FAILURE_TIMEOUT = 60.0  # longest wait of a failed process for the others to arrive
_FILE_TIMEOUT = 10.0  # until a network file system shows a new file on all hosts
_BARRIER_TIMEOUT = 10.0  # at the end of a round
_NOTICE_SECONDS = 60.0  # until a line on stderr names the missing processes
_POLL_SECONDS = 2.0  # of one wait in C++, after which Python can handle a signal

_round = 0  # rounds that have ended in this process


@contextmanager
def announced() -> Iterator[None]:
    """Sends an error in the block to the other processes, which raise it as ParallelError.

    Wrap the work that precedes `check_agreement`; `check_agreement` itself may be inside too.
    Without the message the other processes would wait for the facts of this one. An exit with a
    code other than 0, as after an unknown option, is sent as well. An error within or after the
    round of `check_agreement` is not sent, since the others hold this process's facts already.
    """
    round_before = _round
    try:
        yield
    except (Exception, SystemExit) as error:
        message = _failure(error)
        if message and round_before == _round and _num_processes() > 1:
            with suppress(jax.errors.JaxRuntimeError):
                _exchange("facts", {"error": message}, timeout=_FAILURE_TIMEOUT)
            _end_round()
        raise


def _failure(error: Exception | SystemExit) -> str:
    """Returns the message of an error; empty for an exit with code 0, as after `--help`."""
    if not isinstance(error, SystemExit):
        return f"{type(error).__name__}: {error}"
    return f"it exited with code {error.code}; its output shows why." if error.code else ""


def check_agreement(workdir: str | PathLike[str], recipe: Recipe, splits: Splits) -> None:
    """Returns once all processes have the same recipe, images, versions and workdir.

    All processes must call it, or fail within `announced`.

    Raises:
      ParallelError: in every process, with the differences or with the error of another process.
    """
    if _num_processes() == 1:
        return
    facts = _facts(recipe, splits)  # before the round, so that `announced` sends its errors
    try:
        facts_by_process = _exchange("facts", facts)
        _check_facts(facts_by_process, splits)
        _check_shared(epath.Path(workdir))
    except Exception:  # not KeyboardInterrupt, which must end this process at once
        _end_round()
        raise
    _end_round()


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
    for process, facts in enumerate(facts_by_process):
        if "error" in facts:
            raise ParallelError(f"process {process} of this run has failed: {facts['error']}")
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
    received = _exchange(f"{split} digests", {"digests": digests})
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
    received = _exchange(f"{split} names", {"names": names_to_send})
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
        created = _exchange("file", {"name": name, "problem": problem})[0]  # by process 0
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
    received = _exchange("seen", {"problem": problem})
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


def _exchange(
    name: str, value: Mapping[str, Any], *, timeout: float = float("inf")
) -> list[dict[str, Any]]:
    """Sends a value under a key and returns the values of all processes, in their order.

    Waits until each process has sent its value. After `_NOTICE_SECONDS` it prints which processes
    are missing: a process may be alive and still never send its value.

    Args:
      name: name of the key in this round.
      value: JSON values of this process.
      timeout: longest wait in seconds.

    Raises:
      jax.errors.JaxRuntimeError: a value is missing after `timeout`, or a process has ended.
    """
    client, key = distributed.global_state.client, f"jaxft/{_round}/{name}"
    assert client is not None  # `jax.distributed` is initialised if there are several processes
    client.key_value_set(f"{key}/{distributed.global_state.process_id}", json.dumps(value))
    started, has_printed = time.monotonic(), False
    values: list[dict[str, Any]] = []
    while len(values) < _num_processes():
        try:
            next_key = f"{key}/{len(values)}"
            received = client.blocking_key_value_get(next_key, int(1000 * _POLL_SECONDS))
            values.append(json.loads(received))
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - started
            if "DEADLINE_EXCEEDED" not in str(error) or waited > timeout:
                raise
            if waited > _NOTICE_SECONDS and not has_printed:
                has_printed = True
                sent = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
                missing = ", ".join(str(i) for i in range(_num_processes()) if i not in sent)
                print(
                    f"Waiting for process {missing} of {_num_processes()} to compare recipe, "
                    "images and workdir before training. If a process hangs, end it: the others "
                    "then end with an error.",
                    file=sys.stderr,
                )
    return values


def _end_round() -> None:
    """Waits until all processes have read each other's values, then numbers the next round."""
    global _round
    client = distributed.global_state.client
    assert client is not None  # see `_exchange`
    with suppress(jax.errors.JaxRuntimeError):  # a process is missing: the error is raised already
        client.wait_at_barrier(f"jaxft/{_round}/read", int(1000 * _BARRIER_TIMEOUT))
    _round += 1


def _num_processes() -> int:
    return int(distributed.global_state.num_processes or 1)
