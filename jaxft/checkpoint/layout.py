"""Files of a checkpoint folder: names of the checkpoints, and the content of their headers.

A run's checkpoints are subfolders named by the global step. Each holds a `header` (JSON), an item
per tree of arrays, and checksums. Other subfolders are

    replaced-<step>   a checkpoint that another one is about to replace
    corrupt-<step>    a checkpoint that could not be read
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint import checksums
from jaxft.labels import Tree

REPLACED, CORRUPT, UNFINISHED = "replaced-", "corrupt-", ".orbax-checkpoint-tmp"


def complete_steps(folder: epath.Path) -> set[int]:
    """Returns the steps of the complete checkpoints in a folder."""
    return {metadata.step for metadata in ocp.path.step.standard_name_format().find_all(folder)}


def replaced_checkpoints(folder: epath.Path) -> dict[int, epath.Path]:
    """Returns the checkpoints that another one has replaced or was about to replace, by step."""
    paths = folder.glob(f"{REPLACED}*")
    return {int(path.name.removeprefix(REPLACED)): path for path in paths}


def newest_header(folder: str | PathLike[str]) -> dict[str, Any] | None:
    """Returns the newest readable header in a folder; None if there is none.

    This reads one JSON file, and is safe while a run writes to the folder.
    """
    root = epath.Path(folder)
    if not root.exists():
        return None
    complete = {step: root / str(step) for step in complete_steps(root)}
    checkpoints = replaced_checkpoints(root) | complete
    headers = (read_header(path) for _, path in sorted(checkpoints.items(), reverse=True))
    return next((header for header in headers if header is not None), None)


def read_header(checkpoint: epath.Path) -> dict[str, Any] | None:
    """Returns a checkpoint's header; None if it is missing or damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if not checksums.damage(checkpoint, prefix="header/"):
            file = json.loads((checkpoint / "header" / "metadata").read_text())
            return dict(file["header"])
    return None


def header_file(
    header: Mapping[str, Any], arrays: Mapping[str, Tree], keep: bool
) -> dict[str, Any]:
    """Returns the content of the file: header, whether the checkpoint stays, array shapes."""
    return {"header": dict(header), "keep": keep, "layout": array_layout(arrays)}


def array_layout(arrays: Mapping[str, Tree]) -> dict[str, str]:
    """Returns dtype and shape of each array by its path, such as `float32[3, 3, 64, 64]`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(arrays))
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def nonempty_items(arrays: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns the items that hold any array. Orbax refuses the others."""
    return {name: tree for name, tree in arrays.items() if jax.tree.leaves(tree)}
