"""Weights alone as an Orbax checkpoint, and out of a run's."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint import checksums, contents
from jaxft.checkpoint.atomic import in_bucket
from jaxft.checkpoint.checkpoints import absolute, cause_of, hush, read_progress, whole_steps
from jaxft.errors import CheckpointError
from jaxft.labels import Tree
from jaxft.processes import is_first


def save_weights(
    folder: str | PathLike[str],
    params: Tree,
    stats: Tree,
    *,
    described: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Writes `params` and `stats` as one Orbax checkpoint, whole or not at all.

    Without `replace` there must be none yet. `described` is the JSON of
    `jaxft.weights.description.fields`, kept as the checkpoint's metadata.

    Raises CheckpointError where it cannot be written.

    Anyone's `orbax.checkpoint.StandardCheckpointer().restore(folder)` gives them back as a dict.
    """
    place = absolute(folder)
    try:
        with ocp.StandardCheckpointer() as writer:
            writer.save(
                place, {"params": params, "stats": stats}, force=replace,
                custom_metadata=None if described is None else dict(described),
            )  # fmt: skip
    except Exception as error:  # Orbax has no type of its own for what it cannot write
        raise CheckpointError(f"{place} could not be written: {cause_of(error)}.") from error
    if is_first() and not in_bucket(place):
        checksums.seal(place)


def read_weights(folder: str | PathLike[str]) -> tuple[Tree, Tree]:
    """`params` and `stats` as numpy arrays, on whatever devices they were when written.

    `folder` is one of `save_weights`, a run's checkpoint, or the folder of a run's checkpoints, of
    which the newest counts. A run's are the best of the stage so far, or what an ended one hands
    on. Raises CheckpointError where there is none, or with the name of a file that is damaged.
    """
    place = _newest(folder)
    if damage := checksums.damage(place):
        raise CheckpointError(f"{place} is damaged: {damage}. Bring it back from a copy.")
    if _is_run(place):
        return contents.best_weights(
            lambda item: _arrays(place / item) if (place / item).is_dir() else None
        )
    if not (place / "_METADATA").is_file():
        raise CheckpointError(f"{place} is neither a checkpoint nor a folder of a run's.")
    both = _arrays(place)
    if not {*contents.WEIGHTS} <= both.keys():
        raise CheckpointError(f"{place} holds {', '.join(both)}; it should hold params and stats.")
    return both["params"], both["stats"]


def read_description(folder: str | PathLike[str]) -> Mapping[str, Any]:
    """Returns the JSON that describes the network of a checkpoint; empty where none does.

    `folder` is as in `read_weights`.
    """
    place = _newest(folder)
    if _is_run(place):
        header = read_progress(place)  # None if damaged, which reading the arrays finds
        return contents.Header.from_json(header).description if header else {}
    hush()
    with ocp.StandardCheckpointer() as reader:
        return reader.metadata(absolute(place)).custom_metadata or {}


def _is_run(place: epath.Path) -> bool:
    return bool((place / contents.WEIGHTS[0]).is_dir())


def _newest(folder: str | PathLike[str]) -> epath.Path:
    place = epath.Path(folder)
    steps = whole_steps(place)
    return place / str(max(steps)) if steps else place


def _arrays(folder: epath.Path) -> Any:
    hush()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = absolute(folder)
        tree = reader.metadata(folder).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, ocp.args.PyTreeRestore(restore_args=kinds))
