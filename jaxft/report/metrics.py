"""What a run records: a row an epoch in `metrics.jsonl`, the same numbers for TensorBoard."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any

from etils import epath

from jaxft import atomic
from jaxft.report.events import EventFile


class MetricsLog:
    """The records of one run, from where it begins.

    Records are not worth a run. What cannot be written, as the disk is full, is kept and written
    with the next row; what is still missing when the log is closed is a warning.

    writes: of several processes the first alone; the others' rows go nowhere.
    """

    def __init__(self, workdir: str | PathLike[str], *, writes: bool = True) -> None:
        self._workdir, self._writes, self._failure = epath.Path(workdir), writes, ""
        self._path = self._workdir / "metrics.jsonl"
        self._events: EventFile | None = None

    def begin(self, step: int) -> None:
        """Goes on after a step: rows of later ones are dropped.

        A run that was killed after it wrote a row and before its checkpoint was whole trains that
        epoch again; it must not appear twice.
        """
        if not self._writes:
            return
        rows = self._path.read_text().splitlines() if self._path.exists() else []
        self._rows = [row for row in rows if _step(row) <= step]
        self._events = EventFile(self._workdir / "tensorboard", purge_step=step + 1)
        self._flush()

    def close(self) -> None:
        """Writes out what is missing, if it can."""
        self._flush()
        if self._failure:
            warnings.warn(
                f"the last rows of {self._path}, or TensorBoard's, are missing: {self._failure}",
                RuntimeWarning,
                stacklevel=2,
            )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row: JSON, in which NaN and infinity become null.

        TensorBoard gets its floats at `row["step"]`, and those of a group as `group/name`.
        """
        if self._events is None:
            return
        self._rows.append(json.dumps(_strict(row), allow_nan=False))
        self._events.add(row["step"], dict(_floats(row)))
        self._flush()

    def _flush(self) -> None:
        self._failure = ""
        if self._events is None:
            return
        # Whole: an object of a bucket cannot grow, and what a full disk cuts short is no row.
        rows = "".join(row + "\n" for row in self._rows)
        for write in (partial(atomic.write, self._path, rows), self._events.flush):
            try:
                write()
            except OSError as error:
                self._failure = str(error)


def _floats(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, float):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _floats(value, f"{prefix}{name}/")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(row: str) -> float:
    """The step of a row; infinite for one that was cut short."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
