"""Checkpoints of a run, written in the background by Orbax.

Only this package uses Orbax. See `layout` for the files of a checkpoint. All processes of a run
share the folder; only the first one renames, deletes and verifies.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint import checksums, layout
from jaxft.checkpoint.atomic import in_bucket
from jaxft.checkpoint.layout import CORRUPT, REPLACED, UNFINISHED
from jaxft.checkpoint.orbax_adapter import (
    KeepMarkedAndNewestTwo,
    absolute_path,
    filter_logs,
    write_error_cause,
)
from jaxft.distributed import ask_main_process, is_main_process
from jaxft.errors import CheckpointError, first_of
from jaxft.labels import Tree

_OVERHEAD_BYTES = 2**20  # upper bound of a checkpoint's size without its arrays


@dataclass(frozen=True)
class Restored:
    """Content of a checkpoint.

    Attributes:
      step: Global step.
      header: JSON that was passed to `Checkpoints.save`.
      arrays: Arrays that were passed to `Checkpoints.save`, by item.
      remarks: A sentence per newer checkpoint that could not be read.
    """

    step: int
    header: dict[str, Any]
    arrays: dict[str, Tree]
    remarks: tuple[str, ...] = ()


class Checkpoints:
    """Writes and reads the checkpoints of one run. Close it at the end (`contextlib.closing`).

    Checkpoints saved with `keep` stay; of the others the newest two stay, so that one is complete
    while the other is being written. Only one process group may write to a folder at a time, see
    `train.workdir.claim`. Other readers must not call `save` or `newest`.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        filter_logs()
        self.folder = epath.Path(folder)
        self._writing: int | None = None
        self._marked: set[int] = set()
        self._manager = ocp.CheckpointManager(
            absolute_path(self.folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=KeepMarkedAndNewestTwo(self._marked),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )
        for step in self._manager.all_steps():
            with suppress(_DamagedError):  # reported when it is restored
                if self._read_header(step)["keep"]:
                    self._marked.add(step)

    def close(self) -> None:
        """Waits for the last write, which would otherwise be lost.

        Raises:
          CheckpointError: The write failed, and `save` has not reported it yet.
        """
        with self._write_errors():
            self._manager.close()
        # Not by a reader, next to which a run may be writing. And without `ask_main_process`,
        # because the other processes may have met an error and not arrive here.
        if self._writing is not None and is_main_process():
            self._clean_up()

    # Writing.

    def save(
        self,
        step: int,
        header: Mapping[str, Any],
        arrays: Mapping[str, Tree],
        *,
        keep: bool = False,
    ) -> None:
        """Starts to write the checkpoint of `step`.

        The newest checkpoint may be written again: if the process is killed, either the old or the
        new one is complete. `arrays` may be donated as soon as this returns.

        Args:
          step: Global step, not before the newest checkpoint.
          header: JSON, see `jaxft.checkpoint.contents.Header`.
          arrays: Trees of arrays by item name.
          keep: Keep this checkpoint permanently.

        Raises:
          CheckpointError: The disk is too small, or the previous checkpoint could not be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
        self._clean_up_and_reload()
        newest = self.latest_step()
        if newest is not None and step < newest:  # Orbax would skip it silently
            raise RuntimeError(f"{self.folder}: step {step} is before {newest}.")
        self.check_room(arrays)
        if step == newest:
            self._rename(str(step), f"{REPLACED}{step}")
        (self._marked.add if keep else self._marked.discard)(step)
        items = {
            name: ocp.args.StandardSave(tree)
            for name, tree in layout.nonempty_items(arrays).items()
        }
        file = ocp.args.JsonSave(layout.header_file(header, arrays, keep))
        self._writing = step
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(header=file, **items))

    def check_room(self, arrays: Mapping[str, Tree]) -> None:
        """Raises CheckpointError if the disk has no room for arrays of these shapes."""
        leaves = jax.tree.leaves(dict(arrays))
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + _OVERHEAD_BYTES
        if shortage := ask_main_process(lambda: self._disk_shortage(needed)):
            raise self._write_error(shortage)

    def drop(self, step: int) -> None:
        """Deletes the checkpoint of `step`."""
        self._rename(str(step), f"{step}{UNFINISHED}")  # which `_clean_up` deletes
        self._marked.discard(step)

    # Reading.

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.folder / str(step)

    def header(self, step: int) -> dict[str, Any]:
        """Returns the header stored with `step`, from which the structure of `arrays` follows."""
        return dict(self._read_header(step)["header"])

    def newest(self, like: Callable[[dict[str, Any]], Mapping[str, Tree]]) -> Restored | None:
        """Restores the newest readable checkpoint.

        Unreadable checkpoints are renamed, so that their steps can be written again. The remains of
        a killed process are deleted. Only the run itself may call this, not another reader.

        Args:
          like: Returns the `like` of `restore` for the header of a checkpoint.

        Returns:
          The checkpoint; None if the folder never had one.

        Raises:
          CheckpointError: No checkpoint is readable, or it does not match `like` (see `restore`).
        """
        self._clean_up_and_reload()
        remarks: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self.verify(step)
                header = self.header(step)
                arrays = self._restore(step, like(header))
            except _DamagedError as error:
                self._rename(str(step), f"{CORRUPT}{step}")
                remarks.append(
                    f"{error} It was renamed to {CORRUPT}{step}, and the one before it is used."
                )
            else:
                return Restored(step, header, arrays, tuple(remarks))
        if remarks:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read, and all were renamed. The same "
                "command starts the run over.\n  " + "\n  ".join(remarks)
            )
        return None

    def restore(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        """Restores the arrays of the checkpoint of `step`. All processes must call it.

        Args:
          step: Global step.
          like: Trees of arrays or `jax.ShapeDtypeStruct`, by item name. An array is restored with
            the sharding of its leaf or, without one, to the first device of this process. The
            devices may differ from those that wrote it.

        Returns:
          Arrays with exactly the structure of `like`.

        Raises:
          CheckpointError: Arrays are missing, extra, or of another shape or dtype (all are listed),
            or a file is damaged.
        """
        self.verify(step)
        return self._restore(step, like)

    def verify(self, step: int) -> None:
        """Raises CheckpointError if the checkpoint of `step` has changed since it was written."""
        if damage := ask_main_process(partial(checksums.damage, self.path(step))):
            raise _DamagedError(f"{self.path(step)} is damaged: {damage}.")

    def check(self, step: int, like: Mapping[str, Tree]) -> None:
        """Raises CheckpointError if the items in `like` do not match, without reading arrays."""
        saved, items = self._read_header(step)["layout"], tuple(f"[{name!r}]" for name in like)
        saved = {path: array for path, array in saved.items() if path.startswith(items)}
        self._check_layout(step, saved, like)

    def _restore(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        self._check_layout(step, self._read_header(step)["layout"], like)
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first_device
            ),
            layout.nonempty_items(like),
        )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # the checkpoint is not the cause
        except Exception as error:  # Orbax has no exception type for unreadable checkpoints
            first_line = str(error).partition("\n")[0][:200]
            raise _DamagedError(f"{self.path(step)} cannot be read: {first_line}.") from error
        return {name: restored[name] if name in items else like[name] for name in like}

    def _check_layout(self, step: int, saved: Mapping[str, str], like: Mapping[str, Tree]) -> None:
        expected = layout.array_layout(like)
        if saved != expected:
            differences = [
                f"{path}: {saved.get(path, 'missing')}, not {expected.get(path, 'in the run')}"
                for path in [*expected, *(saved.keys() - expected.keys())]
                if saved.get(path) != expected.get(path)
            ]
            raise CheckpointError(
                "\n  ".join(
                    [f"{self.path(step)} does not fit this run:", *first_of(differences, 8)]
                )
                + "\nContinue with the network and jaxft that wrote it, or choose another workdir."
            )

    def _read_header(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(header=ocp.args.JsonRestore())
        try:
            file = dict(self._manager.restore(step, args=args)["header"])
            return {name: file[name] for name in ("header", "keep", "layout")}
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise _DamagedError(f"{self.path(step)} has no readable header.") from error

    # Files.

    def _seal(self) -> None:
        """Writes the checksums. Orbax calls this in the background, before the final rename."""
        if is_main_process() and not in_bucket(self.folder):  # a bucket verifies its objects itself
            for unnamed in self.folder.glob(f"{self._writing}.*"):
                # Orbax writes to the files directly in the folder once more afterwards.
                checksums.seal(unnamed, subfolders_only=True)

    def _disk_shortage(self, needed: int) -> str:
        """Returns the message for a disk that is too small, or ""."""
        if in_bucket(self.folder) or (free := shutil.disk_usage(self.folder).free) >= needed:
            return ""
        return f"it needs {needed >> 20} MiB, and {free >> 20} MiB are free"

    def _clean_up_and_reload(self) -> None:
        ask_main_process(self._clean_up)
        self._manager.reload()

    def _clean_up(self) -> str:
        """Deletes the remains of finished and interrupted writes. No write may be in progress.

        Returns "", the answer that `first_answers` sends to the other processes.
        """
        for step, replaced in layout.replaced_checkpoints(self.folder).items():
            if step in layout.complete_steps(self.folder):
                replaced.rmtree()
            else:  # the replacement was interrupted
                self.path(step).rmtree(missing_ok=True)
                replaced.rename(self.path(step))
        for unfinished in self.folder.glob(f"*{UNFINISHED}"):
            unfinished.rmtree(missing_ok=True)
        return ""

    def _rename(self, name: str, new_name: str) -> None:
        def rename() -> str:
            target = self.folder / new_name
            target.rmtree(missing_ok=True)
            (self.folder / name).rename(target)
            return ""

        ask_main_process(rename)
        self._manager.reload()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns an error of this or an earlier background write into a CheckpointError."""
        try:
            yield
        except Exception as error:
            raise self._write_error(write_error_cause(error)) from error

    def _write_error(self, cause: str) -> CheckpointError:
        steps = layout.complete_steps(self.folder)
        steps |= layout.replaced_checkpoints(self.folder).keys()
        if steps:
            outlook = f"All up to step {max(steps)} is safe; the same command continues from there"
        else:
            outlook = "The same command starts"
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {cause}. {outlook} once there is "
            "room."
        )


class _DamagedError(CheckpointError):
    """A checkpoint has changed since it was written, or is unreadable."""
