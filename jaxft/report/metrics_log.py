"""What a run records: a row an epoch in `metrics.jsonl`, the same numbers for TensorBoard."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from typing import Any

from etils import epath

from jaxft.checkpoint import atomic
from jaxft.report.tensorboard import EventFile


class MetricsLog:
    """The records of one run, from where it begins.

    Records are not worth a run. What cannot be written, as the disk is full, is kept and written
    with the next row; what is still missing when the log is closed is a warning.

    writes: of several processes the first alone; the others' rows go nowhere.
    """

    def __init__(self, workdir: str | PathLike[str], *, writes: bool = True) -> None:
        self._workdir, self._writes, self._failure = epath.Path(workdir), writes, ""
        self.rows: list[Mapping[str, Any]] = []
        """All rows of the run so far, as JSON; empty where the log does not write."""
        self._path = self._workdir / "metrics.jsonl"
        self._events: EventFile | None = None

    def rows_until(self, step: int) -> list[Mapping[str, Any]]:
        """Returns the rows of `metrics.jsonl` up to `step`, as far as it can be read."""
        rows: list[Mapping[str, Any]] = []
        with suppress(OSError, ValueError, LookupError, TypeError):
            for line in self._path.read_text().splitlines():
                if (row := json.loads(line))["step"] <= step:
                    rows.append(row)
        return rows

    def begin(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Rewrites `metrics.jsonl` with `rows`, those of the checkpoint from which a run resumes.

        A file that was damaged or lost is thereby whole again, and an epoch whose row was written
        before its checkpoint was whole does not appear twice.
        """
        if not self._writes:
            return
        self.rows = list(rows)
        last = self.rows[-1]["step"] if self.rows else 0
        self._events = EventFile(self._workdir / "tensorboard", purge_step=last + 1)
        self._flush()

    def close(self) -> None:
        """Writes out what is missing, if it can."""
        if self._failure:
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
        self.rows.append(_strict(row))
        self._events.add(row["step"], dict(_floats(row)))
        self._flush()

    def _flush(self) -> None:
        self._failure = ""
        if self._events is None:
            return
        # Whole: an object of a bucket cannot grow, and what a full disk cuts short is no row.
        rows = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
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
