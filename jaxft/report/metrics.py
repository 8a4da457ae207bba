"""What a run records: a row an epoch in `metrics.jsonl`, the same numbers for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft import atomic


class MetricsLog:
    """The records of one run, continued after `step`: rows of later steps are dropped.

    A run that was killed after it wrote a row and before its checkpoint was whole trains that
    epoch again; it must not appear twice.
    """

    def __init__(self, workdir: Path, *, step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        rows = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [row for row in rows if _step(row) <= step]
        atomic.write(self._path, "".join(row + "\n" for row in kept))
        from tensorboardX import SummaryWriter  # imports torch where there is one: a second or two

        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        """Writes out what TensorBoard has not got yet."""
        self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; its numbers go to TensorBoard at `row["step"]`."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in {**row, **row.get("rates", {})}.items():
            if isinstance(value, float):
                tag = f"rate/{name}" if name in row.get("rates", {}) else name
                self._events.add_scalar(tag, value, row["step"])
        self._events.flush()


def _step(row: str) -> float:
    """The step of a row; infinite for one that a kill cut short."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError):
        return float("inf")
