"""Checkpoints by Orbax, and nothing else of a run knows Orbax.

One folder a checkpoint, named by the global step, written in the background: a `header` (JSON: the
run's progress, whether it stays, the arrays' layout), the arrays as items, and checksums.

Beside them may lie `replaced-<step>`, until the checkpoint that replaces it is whole, and
`corrupt-<step>`, which could not be read. All processes of a run share the folder; only the first
renames, deletes or judges.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint import checksums
from jaxft.checkpoint.atomic import in_bucket
from jaxft.distributed import ask_main_process, is_main_process
from jaxft.errors import CheckpointError, first_of
from jaxft.labels import Tree

_OVERHEAD = 2**20  # bytes a checkpoint takes beside its arrays, generously
_REPLACED, _CORRUPT = "replaced-", "corrupt-"


def exist(folder: str | PathLike[str]) -> bool:
    """Whether the folder holds a whole checkpoint."""
    place = epath.Path(folder)
    return place.exists() and bool(whole_steps(place) | _replaced(place).keys())


def newest_progress(folder: str | PathLike[str]) -> dict[str, Any] | None:
    """Returns the `progress` of the newest checkpoint whose header is whole; None without one.

    Reads one JSON file, so that it serves before anything else is opened, and beside a run.
    """
    place = epath.Path(folder)
    if not place.exists():
        return None
    paths = {step: place / str(step) for step in whole_steps(place)}
    headers = (
        read_progress(path) for _, path in sorted((_replaced(place) | paths).items(), reverse=True)
    )
    return next((progress for progress in headers if progress is not None), None)


def read_progress(checkpoint: epath.Path) -> dict[str, Any] | None:
    """Returns the `progress` in a checkpoint's header; None if it is damaged or not there."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if not checksums.damage(checkpoint, prefix="header/"):
            header = json.loads((checkpoint / "header" / "metadata").read_text())
            return dict(header["progress"])
    return None


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: the global step that numbers it.
      progress: what `save` was given.
      arrays: likewise, by item.
      remarks: a sentence on each newer checkpoint that could not be read.
    """

    step: int
    progress: dict[str, Any]
    arrays: dict[str, Tree]
    remarks: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run; to be closed (`contextlib.closing`).

    Those that are marked stay; of the others the newest two: while one is being written the other
    is whole. One run's, see `train.workdir.claim`; an onlooker beside it must neither `save` nor
    ask for the `newest`.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        hush()
        self.folder = epath.Path(folder)
        self._writing: int | None = None
        self._marked: set[int] = set()
        self._manager = ocp.CheckpointManager(
            absolute(self.folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Marked(self._marked),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )
        for step in self._manager.all_steps():
            with suppress(_DamagedError):  # whoever restores it will say so
                if self._header(step)["keep"]:
                    self._marked.add(step)

    def close(self) -> None:
        """Waits for the last write: an asynchronous one that nobody waits for is lost.

        Raises CheckpointError if that failed, unless `save` has said so already.
        """
        with self._failing_clearly():
            self._manager.close()
        # Not an onlooker, beside whom a run may be writing; and without a call for the other
        # processes, which may have met an error.
        if self._writing is not None and is_main_process():
            self._tidy()

    def save(
        self,
        step: int,
        progress: Mapping[str, Any],
        arrays: Mapping[str, Tree],
        *,
        keep: bool = False,
    ) -> None:
        """Starts to write the checkpoint of `step`, which must not be before the newest.

        If it is the newest, it is replaced: killed at any moment, either is there. `arrays` may be
        donated as soon as this returns.

        Args:
          step: the global step.
          progress: JSON.
          arrays: named items.
          keep: whether it stays for good.

        Raises:
          CheckpointError: it does not fit on the disk, or the one before could not be written.
        """
        with self._failing_clearly():
            self._manager.wait_until_finished()
        self._settle()
        newest = self.latest_step()
        if newest is not None and step < newest:  # Orbax declines it without a word
            raise RuntimeError(f"{self.folder}: step {step} is before {newest}.")
        self.check_room(arrays)
        if step == newest:
            self._rename(str(step), f"{_REPLACED}{step}")
        (self._marked.add if keep else self._marked.discard)(step)
        items = {name: ocp.args.StandardSave(tree) for name, tree in _filled(arrays).items()}
        header = {"progress": dict(progress), "keep": keep, "layout": _layout(arrays)}
        args = ocp.args.Composite(header=ocp.args.JsonSave(header), **items)
        self._writing = step
        with self._failing_clearly():
            self._manager.save(step, args=args)

    def check_room(self, arrays: Mapping[str, Tree]) -> None:
        """Raises CheckpointError if the disk has no room for arrays of these shapes."""
        leaves = jax.tree.leaves(dict(arrays))
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + _OVERHEAD
        if lack := ask_main_process(lambda: self._lack(needed)):
            raise self._failure(lack)

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, from the oldest."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / str(step)

    def progress(self, step: int) -> dict[str, Any]:
        """The `progress` of the checkpoint of `step`; it says what structure the arrays have."""
        return dict(self._header(step)["progress"])

    def newest(self, like: Callable[[dict[str, Any]], Mapping[str, Tree]]) -> Restored | None:
        """The newest checkpoint that can be read; none if there never was one.

        What cannot be read is moved aside, so that its step can be written again. Also tidies up
        after a run that was killed: for the process that goes on with it, not for onlookers.

        like: what `restore` takes, given the progress.

        Raises:
          CheckpointError: it does not fit, see `restore`; or none of them can be read.
        """
        self._settle()
        remarks: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self.verify(step)
                progress = self.progress(step)
                arrays = self._restore(step, like(progress))
            except _DamagedError as error:
                self._rename(str(step), f"{_CORRUPT}{step}")
                remarks.append(f"{error} It is now {_CORRUPT}{step}, and the one before it counts.")
            else:
                return Restored(step, progress, arrays, tuple(remarks))
        if remarks:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read, and all were moved aside. The same "
                "command starts the run over.\n  " + "\n  ".join(remarks)
            )
        return None

    def drop(self, step: int) -> None:
        """Removes the checkpoint of `step`."""
        self._rename(str(step), f"{step}.orbax-checkpoint-tmp")  # which is tidied away
        self._marked.discard(step)

    def restore(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        """The arrays of the checkpoint of `step`, in exactly the structure of `like`.

        `like` may hold `jax.ShapeDtypeStruct` leaves. An array goes where the leaf's sharding says,
        whatever devices it was on when written; without one, to this process's first device.

        Raises CheckpointError with all that is missing, extra, or of another shape or type; or with
        a file that is damaged. All processes must call it.
        """
        self.verify(step)
        return self._restore(step, like)

    def verify(self, step: int) -> None:
        """Raises CheckpointError if the checkpoint of `step` is not what was written."""
        if damage := ask_main_process(partial(checksums.damage, self.path(step))):
            raise _DamagedError(f"{self.path(step)} is damaged: {damage}.")

    def _restore(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        self._fits(step, self._header(step)["layout"], like)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
            ),
            _filled(like),
        )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax has no type of its own for what it cannot read
            line = str(error).partition("\n")[0][:200]
            raise _DamagedError(f"{self.path(step)} cannot be read: {line}.") from error
        return {name: restored[name] if name in items else like[name] for name in like}

    def check(self, step: int, like: Mapping[str, Tree]) -> None:
        """Raises CheckpointError as `restore` would for the items that `like` has; reads none."""
        layout, items = self._header(step)["layout"], tuple(f"[{name!r}]" for name in like)
        self._fits(step, {k: v for k, v in layout.items() if k.startswith(items)}, like)

    def _fits(self, step: int, saved: Mapping[str, str], like: Mapping[str, Tree]) -> None:
        wanted = _layout(like)
        if saved != wanted:
            other = [
                f"{path}: {saved.get(path, 'missing')}, not {wanted.get(path, 'in the run')}"
                for path in [*wanted, *(saved.keys() - wanted.keys())]
                if saved.get(path) != wanted.get(path)
            ]
            raise CheckpointError(
                "\n  ".join([f"{self.path(step)} does not fit this run:", *first_of(other, 8)])
                + "\nGo on with the network and jaxft that wrote it, or choose another workdir."
            )

    def _header(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(header=ocp.args.JsonRestore())
        try:
            header = dict(self._manager.restore(step, args=args)["header"])
            return {name: header[name] for name in ("progress", "keep", "layout")}
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise _DamagedError(f"{self.path(step)} has no readable header.") from error

    def _seal(self) -> None:
        """In the background, when all is written and about to get its name."""
        if is_main_process() and not in_bucket(self.folder):  # a bucket has checksums of its own
            for unnamed in self.folder.glob(f"{self._writing}.*"):
                # Orbax writes to the files directly in it once more, last of all.
                checksums.seal(unnamed, subfolders_only=True)

    def _lack(self, needed: int) -> str:
        if in_bucket(self.folder) or (free := shutil.disk_usage(self.folder).free) >= needed:
            return ""
        # A write that fails half-way is safe too, but loud.
        return f"it needs {needed >> 20} MiB, and {free >> 20} MiB are free"

    def _settle(self) -> None:
        ask_main_process(self._tidy)
        self._manager.reload()

    def _tidy(self) -> str:
        """Clears away what a write has left, whole or cut short; not while there is one."""
        for step, old in _replaced(self.folder).items():
            if step in whole_steps(self.folder):
                old.rmtree()
            else:  # nothing whole took its place
                self.path(step).rmtree(missing_ok=True)
                old.rename(self.path(step))
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
            unfinished.rmtree(missing_ok=True)
        return ""

    def _rename(self, name: str, to: str) -> None:
        def rename() -> str:
            target = self.folder / to
            target.rmtree(missing_ok=True)
            (self.folder / name).rename(target)
            return ""

        ask_main_process(rename)
        self._manager.reload()

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        """Turns what a background write fails with, now or earlier, into one sentence."""
        try:
            yield
        except Exception as error:
            raise self._failure(cause_of(error)) from error

    def _failure(self, cause: str) -> CheckpointError:
        whole = whole_steps(self.folder) | _replaced(self.folder).keys()
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {cause}. "
            + (f"All up to step {max(whole)} is safe; the" if whole else "The")
            + f" same command {'goes on from there' if whole else 'starts'} once there is room."
        )


class _DamagedError(CheckpointError):
    """A checkpoint is not what was written, as opposed to not what is wanted."""


@dataclass(frozen=True)
class _Marked(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps what is marked, and of the others the newest two."""

    marked: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        others = [info.step for info in checkpoints if info.step not in self.marked]
        return [info.step in self.marked or info.step in others[-2:] for info in checkpoints]


def _filled(arrays: Mapping[str, Tree]) -> dict[str, Tree]:
    """The items that hold any array; Orbax refuses others."""
    return {name: tree for name, tree in arrays.items() if jax.tree.leaves(tree)}


def _layout(arrays: Mapping[str, Tree]) -> dict[str, str]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(dict(arrays))
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in keyed}


def whole_steps(folder: epath.Path) -> set[int]:
    """Those of the whole checkpoints in a folder."""
    return {found.step for found in ocp.path.step.standard_name_format().find_all(folder)}


def _replaced(folder: epath.Path) -> dict[int, epath.Path]:
    """By their steps, the checkpoints that another one has replaced, or was about to."""
    paths = folder.glob(f"{_REPLACED}*")
    return {int(path.name.removeprefix(_REPLACED)): path for path in paths}


def cause_of(error: Exception) -> str:
    """Returns why Orbax could not write, in a few words where it is the disk."""
    found = re.search("No space left on device|Permission denied", str(error))
    return found[0] if found else str(error)


def absolute(folder: str | PathLike[str]) -> epath.Path:
    """The folder as Orbax wants it."""
    place = epath.Path(folder)
    return place if in_bucket(place) else place.resolve()


def hush() -> None:
    """Keeps Orbax from logging what our errors say, each of its threads with a traceback."""
    logging.getLogger("absl").addFilter(_is_news)  # once: it is the same filter every time


def _is_news(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    known = (
        "Metadata file does not exist|(parse|read) Metadata file|directory .* already exists"
        "|Failed to get item metadata|contains unknown key|Waiting for previous save"
    )
    return not (record.exc_info or re.search(known, record.getMessage()))
