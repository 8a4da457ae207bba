"""What the steps of an epoch come to, as far as it has gone."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxft.train.evaluate import Score
from jaxft.train.step import Record


@dataclass(frozen=True)
class Sums:
    """Sums over the steps so far; a checkpoint within an epoch holds them.

    They are added step by step in float64, so that they come out the same wherever an epoch was
    interrupted.

    Attributes:
      rates: of the epoch's first step, by group.
      tally: of loss, hits, hits among the top five, and examples; see `Tally`.
      gradient_norms, update_norms: by group; see `Record`.
      steps: those that were taken.
      skipped: those that were not, because something was not finite.
      seconds: how long they took.
      idle: how long of that the device waited for images.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    tally: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    update_norms: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    idle: float = 0.0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Sums":
        """The inverse of `dataclasses.asdict`, also after a detour through JSON."""
        return cls(**{**fields, "tally": tuple(fields["tally"])})

    def plus(self, records: Iterable[Record], *, seconds: float, idle: float) -> "Sums":
        """With further steps, fetched from the device, and the time they took."""
        sums = dataclasses.replace(self, seconds=self.seconds + seconds, idle=self.idle + idle)
        for record in records:
            finite = bool(record.finite)
            sums = dataclasses.replace(
                sums,
                tally=tuple(a + float(b) for a, b in zip(sums.tally, record.tally, strict=True)),
                gradient_norms=_added(sums.gradient_norms, record.gradient_norms),
                update_norms=_added(sums.update_norms, record.update_norms),
                steps=sums.steps + finite,
                skipped=sums.skipped + (not finite),
            )
        return sums

    @property
    def score(self) -> Score:
        """The means over the examples."""
        *sums, examples = self.tally
        return Score(*(x / examples if examples else math.nan for x in sums))

    def mean(self, norms: Mapping[str, float]) -> dict[str, float]:
        """The mean over the steps that were taken."""
        return {group: x / self.steps if self.steps else math.nan for group, x in norms.items()}


def _added(sums: Mapping[str, float], more: Mapping[str, Any]) -> dict[str, float]:
    return {group: sums.get(group, 0.0) + float(x) for group, x in more.items()}
