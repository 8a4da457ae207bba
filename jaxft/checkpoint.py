"""Checkpoints by Orbax, and nothing else knows Orbax.

One folder a checkpoint, named by the global step, written in the background. Each holds a
`header` (JSON: the run's progress, and the layout of the arrays) and the arrays, as items that
can be restored one by one.
"""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxft.errors import CheckpointError
from jaxft.labels import Tree

_OVERHEAD = 2**20  # bytes a checkpoint takes beside its arrays, generously


def exist(folder: Path) -> bool:
    """Whether the folder holds a whole checkpoint."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run; to be closed (`contextlib.closing`).

    The newest two are kept: while one is being written the other is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def close(self) -> None:
        """Waits for the last write: an asynchronous one that nobody waits for is lost."""
        with self._failing_clearly():
            self._manager.close()

    def save(self, step: int, progress: Mapping[str, Any], arrays: Mapping[str, Tree]) -> None:
        """Starts to write the checkpoint of `step`; `progress` must be JSON.

        `arrays` may be donated as soon as this returns.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(arrays))) + _OVERHEAD
        free = shutil.disk_usage(self.folder).free
        if free < needed:  # a write that fails half-way is safe too, but loud
            raise self._failure(f"it needs {needed >> 20} MiB, and {free >> 20} MiB are free")
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        header = {"progress": dict(progress), "layout": _layout(arrays)}
        args = ocp.args.Composite(header=ocp.args.JsonSave(header), **items)
        with self._failing_clearly():
            saved = self._manager.save(step, args=args)
        if not saved:  # Orbax declines a step that is not after its newest, without a word
            raise RuntimeError(f"{self.folder}: step {step} is not after {self.latest_step()}.")

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / str(step)

    def progress(self, step: int) -> dict[str, Any]:
        """The `progress` of the checkpoint of `step`; it says what structure the arrays have."""
        return dict(self._header(step)["progress"])

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        """Turns what a background write fails with, now or earlier, into one sentence."""
        try:
            yield
        except Exception as error:
            # What hangs on the failed write complains of it on its way out, at length.
            logging.getLogger("asyncio").disabled = True
            cause = re.search("No space left on device|Permission denied", str(error))
            raise self._failure(cause[0] if cause else str(error)) from error

    def _failure(self, cause: str) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {cause}. All up to step "
            f"{self.latest_step()} is safe; the same command goes on from there once there is room."
        )

    def _header(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(header=ocp.args.JsonRestore())
        try:
            return dict(self._manager.restore(step, args=args)["header"])
        except (KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{self.path(step)} has no header: another program wrote it, or an older jaxft."
            ) from error

    def restore(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        """The arrays of the checkpoint of `step`, in exactly the structure of `like`.

        `like` may hold `jax.ShapeDtypeStruct` leaves. Raises CheckpointError with all that is
        missing, extra, or of another shape or type.
        """
        saved, wanted = self._header(step)["layout"], _layout(like)
        if saved != wanted:
            other = [
                f"{path}: {saved.get(path, 'missing')}, not {wanted.get(path, 'in the run')}"
                for path in [*wanted, *(saved.keys() - wanted.keys())]
                if saved.get(path) != wanted.get(path)
            ]
            more = f"\n  and {len(other) - 8} more" if len(other) > 8 else ""
            raise CheckpointError(
                f"{self.path(step)} does not fit this run:\n  " + "\n  ".join(other[:8]) + more
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}


def _layout(arrays: Mapping[str, Tree]) -> dict[str, str]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(dict(arrays))
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in keyed}


def save_weights(folder: Path, params: Tree, stats: Tree) -> None:
    """Writes `params` and `stats` as one Orbax checkpoint, whole or not at all.

    Anyone's `orbax.checkpoint.StandardCheckpointer().restore(folder)` gives them back as a dict.
    """
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), {"params": params, "stats": stats})


def read_weights(folder: Path) -> tuple[Tree, Tree]:
    """`params` and `stats` as numpy arrays, on whatever devices they were when written.

    `folder` is one of `save_weights`, a run's checkpoint, or the folder of a run's checkpoints, of
    which the newest counts. A run's are the best of the stage so far, or what an ended one hands
    on. Raises CheckpointError where there is none.
    """
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    if steps:
        folder = max(steps, key=lambda path: int(path.name))
    if (folder / "best").is_dir():
        best = _arrays(folder / "best")
        return best["params"], best["stats"]
    if all((folder / item).is_dir() for item in ("params", "stats")):
        return _arrays(folder / "params"), _arrays(folder / "stats")
    if not (folder / "_METADATA").is_file():
        raise CheckpointError(f"{folder} is neither a checkpoint nor a folder of a run's.")
    both = _arrays(folder)
    if not {"params", "stats"} <= both.keys():
        raise CheckpointError(f"{folder} holds {', '.join(both)}; it should hold params and stats.")
    return both["params"], both["stats"]


def _arrays(folder: Path) -> Any:
    # Orbax complains of a file that it writes for whole checkpoints, not for their items.
    logging.getLogger("absl").addFilter(_is_no_complaint)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder.absolute()).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=kinds))


def _is_no_complaint(record: logging.LogRecord) -> bool:
    return "Metadata file does not exist" not in record.getMessage()
