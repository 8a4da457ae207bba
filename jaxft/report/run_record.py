"""Records of a run for its report: recipe, rows of epochs, starts, score, seconds of each stage."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxft.data.image_files import printable
from jaxft.recipe import Recipe
from jaxft.train.metrics import Score
from jaxft.train.state import Progress
from jaxft.train.workdir import read_run

Row = Mapping[str, Any]
"""A row of `metrics.jsonl`; None stands for NaN and infinity."""

PHASES = {
    "steps": "training steps",
    "input": "waiting for images",
    "features": "computing cached features",
    "validation": "validation",
    "compile": "waiting for the compiler",
    "checkpoints": "waiting for checkpoints",
    "other": "other",
}
"""Phases of a stage, and their names in the report."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run recorded about itself, without arrays.

    Attributes:
      name: name of the run's folder.
      recipe: the run's recipe.
      rows: a row per epoch.
      starts: the entries of `environment.json`.
      progress: counters and scores.
      data: facts of the images, see `jaxft.data.fingerprint.record`.
    """

    name: str
    recipe: Recipe
    rows: Sequence[Row]
    starts: Sequence[Mapping[str, Any]]
    progress: Progress
    data: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether all stages have ended."""
        return bool(self.progress.ended) and self.progress.stage == len(self.recipe.stages) - 1

    @property
    def score(self) -> Score:
        """Validation score of the run's weights: the best of the stage so far, or its result."""
        stage = self.recipe.stages[self.progress.stage]
        return self.progress.restored_score(stage) if self.progress.ended else self.progress.best

    @property
    def stages(self) -> dict[str, list[Row]]:
        """The rows of each stage that has any."""
        grouped = groupby(self.rows, key=lambda row: row["stage"])
        return {name: list(rows) for name, rows in grouped}


def read_record(workdir: Path) -> RunRecord:
    """Reads the records of a run, ended or not.

    Raises:
      CheckpointError: the folder holds no run with a checkpoint.
    """
    recipe, header = read_run(workdir)
    progress = Progress.from_fields(header.progress)
    return RunRecord(
        run_name(workdir), recipe, header.rows, read_starts(workdir), progress, header.data
    )


def run_name(workdir: Path) -> str:
    """Returns the name of a run's folder as printable text."""
    return printable(workdir.name or Path(workdir).resolve().name)


def read_starts(workdir: Path) -> list[Mapping[str, Any]]:
    """Returns the entries of `environment.json`; nothing if it cannot be read."""
    with suppress(OSError, ValueError):
        starts = json.loads((workdir / "environment.json").read_text())
        return [start for start in starts if isinstance(start, dict)]
    return []


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a stage.

    Attributes:
      phases: seconds of each of `PHASES`.
      restarts: seconds that restarts took: from the last epoch that was recorded before a restart
        to the next, without the phases that this next epoch records.
    """

    phases: Mapping[str, float]
    restarts: float


def stage_seconds(record: RunRecord) -> dict[str, StageSeconds]:
    """Returns the seconds of each stage; of rows without times, as of older versions, nothing.

    Seconds between two rows that no phase accounts for belong to "other", or to `restarts` if the
    run has been started in between.
    """
    starts = [time for start in record.starts if (time := _seconds(start.get("time"))) is not None]
    seconds: dict[str, StageSeconds] = {}
    before = starts[0] if starts else None
    for row in record.rows:
        now = _seconds(row.get("time"))
        if now is None:
            continue
        phases = _phases(row)
        rest = max(0.0, now - before - sum(phases.values())) if before is not None else 0.0
        is_restarted = before is not None and any(before < start < now for start in starts)
        phases["other"] = 0.0 if is_restarted else rest
        old = seconds.get(row["stage"], StageSeconds({}, 0.0))
        seconds[row["stage"]] = StageSeconds(
            {name: old.phases.get(name, 0.0) + phases[name] for name in PHASES},
            old.restarts + (rest if is_restarted else 0.0),
        )
        before = now
    return seconds


def _phases(row: Row) -> dict[str, float]:
    features = row["feature_seconds"]
    return {
        "steps": row["step_seconds"],
        "input": max(0.0, row["input_wait_seconds"] - features),  # which includes the features
        "features": features,
        "validation": row["validation_seconds"],
        "compile": row["compile_seconds"],
        "checkpoints": row["checkpoint_seconds"],
    }


def _seconds(time: Any) -> float | None:
    """Returns a time in ISO format as seconds since 1970; None if it is none."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return None
