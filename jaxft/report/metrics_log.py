"""Records one row of metrics per epoch, in `metrics.jsonl` and for TensorBoard."""

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
    """Metrics of one run.

    A full disk does not end the run. Rows that cannot be written are kept and written with the next
    row. If rows are still missing when the log is closed, `close` emits a RuntimeWarning.
    """

    def __init__(self, workdir: str | PathLike[str], *, writes: bool = True) -> None:
        """Creates a log; `begin` opens its files.

        Args:
          workdir: folder of the run.
          writes: whether to write files; with several processes, only the first one should.
        """
        self._workdir, self._writes, self._failure = epath.Path(workdir), writes, ""
        self.rows: list[Mapping[str, Any]] = []
        """All rows of the run so far, as JSON values; empty if the log does not write."""
        self._path = self._workdir / "metrics.jsonl"
        self._events: EventFile | None = None

    def rows_until(self, step: int) -> list[Mapping[str, Any]]:
        """Returns the rows of `metrics.jsonl` up to `step`, as far as the file is readable."""
        rows: list[Mapping[str, Any]] = []
        with suppress(OSError, ValueError, LookupError, TypeError):
            for line in self._path.read_text().splitlines():
                if (row := json.loads(line))["step"] <= step:
                    rows.append(row)
        return rows

    def begin(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Opens the files and rewrites `metrics.jsonl` with the rows of the resumed checkpoint.

        This restores a damaged or lost file. It also removes rows that were written before their
        checkpoint was complete, so that no epoch appears twice.
        """
        if not self._writes:
            return
        self.rows = list(rows)
        last = self.rows[-1]["step"] if self.rows else 0
        self._events = EventFile(self._workdir / "tensorboard", purge_step=last + 1)
        self._flush()

    def close(self) -> None:
        """Writes rows that are still missing; warns if that fails."""
        if self._failure:
            self._flush()
        if self._failure:
            warnings.warn(
                f"the last rows of {self._path}, or TensorBoard's, are missing: {self._failure}",
                RuntimeWarning,
                stacklevel=2,
            )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row.

        In `metrics.jsonl`, NaN and infinity become null. TensorBoard receives the floats at
        `row["step"]`; a float in a nested mapping has the tag `mapping/name`.
        """
        if self._events is None:
            return
        self.rows.append(to_json(row))
        self._events.add(row["step"], dict(_floats(row)))
        self._flush()

    def _flush(self) -> None:
        self._failure = ""
        if self._events is None:
            return
        # The whole file is rewritten: an object in a bucket cannot be extended, and a full disk
        # could cut off a row.
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


def to_json(value: Any) -> Any:
    """Returns a copy of a row or of its values, with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
