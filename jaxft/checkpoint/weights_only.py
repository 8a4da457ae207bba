"""Saves weights alone as an Orbax checkpoint, and reads the weights of any checkpoint."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint import checksums, contents
from jaxft.checkpoint.atomic import in_bucket
from jaxft.checkpoint.layout import complete_steps, read_header
from jaxft.checkpoint.orbax_adapter import absolute_path, filter_logs, write_error_cause
from jaxft.distributed import is_main_process
from jaxft.errors import CheckpointError
from jaxft.labels import Tree


def save_weights(
    folder: str | PathLike[str],
    params: Tree,
    stats: Tree,
    *,
    described: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Saves `params` and `stats` as one Orbax checkpoint, atomically.

    Args:
      folder: New folder.
      params: Parameters.
      stats: Running statistics.
      described: JSON of `jaxft.weights.description.fields`, stored as the checkpoint's metadata.
      replace: Replace an existing checkpoint.

    Raises:
      CheckpointError: The checkpoint cannot be written.

    Example:
      trees = orbax.checkpoint.StandardCheckpointer().restore(folder)
      params, stats = trees["params"], trees["stats"]
    """
    path = absolute_path(folder)
    try:
        with ocp.StandardCheckpointer() as writer:
            writer.save(
                path, {"params": params, "stats": stats}, force=replace,
                custom_metadata=None if described is None else dict(described),
            )  # fmt: skip
    except Exception as error:  # Orbax has no exception type for failed writes
        cause = write_error_cause(error)
        raise CheckpointError(f"{path} could not be written: {cause}.") from error
    if is_main_process() and not in_bucket(path):
        checksums.seal(path)


def read_weights(folder: str | PathLike[str]) -> tuple[Tree, Tree]:
    """Reads the weights of a checkpoint.

    Args:
      folder: A checkpoint of `save_weights`, a checkpoint of a run, or the folder of a run's
        checkpoints, whose newest is used. From a run's checkpoint the best weights of the stage so
        far are read or, if the stage has ended, its result.

    Returns:
      `(params, stats)` as NumPy arrays.

    Raises:
      CheckpointError: There is no checkpoint, or a file is damaged, which is named.
    """
    path = _newest(folder)
    if damage := checksums.damage(path):
        raise CheckpointError(f"{path} is damaged: {damage}. Restore it from a copy.")
    if _is_run(path):
        return contents.best_weights(
            lambda item: _read_item(path / item) if (path / item).is_dir() else None
        )
    if not (path / "_METADATA").is_file():
        raise CheckpointError(f"{path} is neither a checkpoint nor a folder of a run's.")
    trees = _read_item(path)
    if not {*contents.WEIGHTS} <= trees.keys():
        raise CheckpointError(f"{path} holds {', '.join(trees)}; it should hold params and stats.")
    return trees["params"], trees["stats"]


def read_description(folder: str | PathLike[str]) -> Mapping[str, Any]:
    """Returns the JSON that describes the network of a checkpoint; empty if it has none.

    Args:
      folder: As in `read_weights`.
    """
    path = _newest(folder)
    if _is_run(path):
        header = read_header(path)  # None if damaged, which reading the arrays finds
        return contents.Header.from_json(header).description if header else {}
    filter_logs()
    with ocp.StandardCheckpointer() as reader:
        return reader.metadata(absolute_path(path)).custom_metadata or {}


def _is_run(place: epath.Path) -> bool:
    return bool((place / contents.WEIGHTS[0]).is_dir())


def _newest(folder: str | PathLike[str]) -> epath.Path:
    path = epath.Path(folder)
    steps = complete_steps(path)
    return path / str(max(steps)) if steps else path


def _read_item(folder: epath.Path) -> Any:
    filter_logs()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        path = absolute_path(folder)
        tree = reader.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, ocp.args.PyTreeRestore(restore_args=restore_args))
