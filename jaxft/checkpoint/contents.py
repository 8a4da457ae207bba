"""Contents of a run's checkpoint: its items, and the fields of the run's header.

`jaxft.checkpoint.layout` wraps the header and stores it beside the items.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optax

from jaxft.errors import CheckpointError
from jaxft.labels import Tree, filled

WEIGHTS = ("params", "stats")
"""Items that hold a network's weights."""


class Snapshot(NamedTuple):
    """All arrays of a run at one moment: full parameters, statistics, optimizer state."""

    params: Tree
    stats: Tree
    opt_state: optax.OptState


@dataclass(frozen=True)
class Arrays:
    """Arrays of a checkpoint.

    Attributes:
      current: arrays after the last step; at a stage's end, the start of the next stage.
      best: arrays of the stage's best epoch; None at the end of a stage. Leaves that the stage
        never changes are None when they are written, and filled in when they are read.
      average: average of `(params, stats)`, if the stage has an `ema`; None for frozen leaves.
        Its number of steps follows if it depends on that.
    """

    current: Snapshot
    best: Snapshot | None = None
    average: tuple[Tree, ...] | None = None

    def to_items(self) -> dict[str, Tree]:
        """Returns the items of the checkpoint by name."""
        items: dict[str, Tree] = self.current._asdict()
        if self.best is not None:
            items["best"] = self.best._asdict()
        if self.average is not None:
            items["average"] = list(self.average)
        return items

    @classmethod
    def from_items(cls, items: Mapping[str, Tree]) -> "Arrays":
        """Inverts `to_items`; fills the leaves that `best` shares with the current arrays."""
        current = Snapshot(*(items[name] for name in Snapshot._fields))
        best = None
        if "best" in items:
            best = Snapshot(**items["best"])
            shared = {name: filled(items["best"][name], items[name]) for name in WEIGHTS}
            best = best._replace(**shared)
        average = tuple(items["average"]) if "average" in items else None
        return cls(current, best, average)


def best_weights(read: Callable[[str], Any]) -> tuple[Tree, Tree]:
    """Returns the `(params, stats)` of the best epoch; of a checkpoint at a stage's end, its own.

    Args:
      read: returns the item with this name, or None. A network without norm layers has no `stats`.
    """
    current = {name: read(name) or {} for name in WEIGHTS}
    best = read("best") or current
    params, stats = (filled(best.get(name, {}), current[name]) for name in WEIGHTS)
    return params, stats


@dataclass(frozen=True)
class Header:
    """The JSON part of a checkpoint.

    Attributes:
      progress: fields of `jaxft.train.state.Progress`.
      epoch_metrics: fields of `jaxft.train.metrics.EpochMetrics`.
      data: dataset facts that must match on resume; see `jaxft.data.fingerprint.record`.
      recipe: fields of the recipe.
      rows: rows of `metrics.jsonl` so far.
    """

    progress: Mapping[str, Any]
    epoch_metrics: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Returns the header as values that JSON can hold."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Header":
        """Inverts `to_json`.

        Raises:
          CheckpointError: another version of jaxft wrote the header.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if names != values.keys():
            raise CheckpointError(
                f"the checkpoint's header has the fields {', '.join(sorted(values))}, not "
                f"{', '.join(sorted(names))}: another version of jaxft wrote it. Continue with "
                "that version, or choose another --workdir."
            )
        return cls(**values)

    @property
    def description(self) -> dict[str, Any]:
        """The recipe's fields, among them the network's options, and facts of its images."""
        names = ("classes", "pixels", "multi_label")  # old checkpoints have only the classes
        return {**self.recipe, **{name: self.data.get(name) for name in names}}
