"""Adapts Orbax: paths, which checkpoints to keep, log messages and errors."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxft.checkpoint.atomic import in_bucket


@dataclass(frozen=True)
class KeepMarkedAndNewestTwo(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps marked checkpoints, and the newest two of the others.

    Two, so that one is complete while the other is being written.

    Attributes:
      marked: Steps of the marked checkpoints.
    """

    marked: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns whether to keep each checkpoint."""
        unmarked = [info.step for info in checkpoints if info.step not in self.marked]
        return [info.step in self.marked or info.step in unmarked[-2:] for info in checkpoints]


def absolute_path(folder: str | PathLike[str]) -> epath.Path:
    """Returns the absolute path that Orbax requires."""
    path = epath.Path(folder)
    return path if in_bucket(path) else path.resolve()


def write_error_cause(error: Exception) -> str:
    """Returns why Orbax could not write; short if the disk is the cause."""
    match = re.search("No space left on device|Permission denied", str(error))
    return match[0] if match else str(error)


def filter_logs() -> None:
    """Suppresses Orbax's log messages about errors that jaxft reports itself.

    Each of Orbax's threads would log them with a traceback.
    """
    logging.getLogger("absl").addFilter(_is_relevant)  # adding the same filter again has no effect


def _is_relevant(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    known = (
        "Metadata file does not exist|(parse|read) Metadata file|directory .* already exists"
        "|Failed to get item metadata|contains unknown key|Waiting for previous save"
    )
    return not (record.exc_info or re.search(known, record.getMessage()))
