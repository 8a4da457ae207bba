"""Loss, accuracy and own metrics: sums over a batch, an epoch or an evaluation; their means."""

import dataclasses
import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxft import example_function
from jaxft.labels import Tree
from jaxft.losses import LossChoice, example_losses

MEASURED = (
    "time", "seconds", "step_seconds", "input_wait_seconds", "validation_seconds",
    "compile_seconds", "checkpoint_seconds", "feature_seconds", "images_per_second",
    "peak_memory_mib",
)  # fmt: skip
"""Fields of a row that are measured, and differ between runs with equal results."""

_MAX_THREADS = 8  # that help: each holds the GIL for more than a tenth of an image's time
_SLOW_SHARE = 0.3  # of an epoch, from which on waiting for images is worth a remark
_SLOW_SECONDS = 2.0  # an epoch, below which it is not


@dataclass(frozen=True)
class Score:
    """Means over a set of examples: loss (cross entropy in nats), accuracies from 0 to 1.

    Attributes:
      accuracy: of images with several labels, the mean over images and classes.
      top5: None if images may have several labels.
      custom: the recipe's metrics, by name.
    """

    loss: float
    accuracy: float
    top5: float | None
    custom: Mapping[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """All metrics by name."""
        named = {"loss": self.loss, "accuracy": self.accuracy}
        if self.top5 is not None:
            named["top5"] = self.top5
        return named | dict(self.custom)


class Metrics(NamedTuple):
    """Sums over examples, without padding.

    On the device: scalars of one batch. On the host: float64 sums of many.

    Attributes:
      loss: loss of the stage; cross entropy in nats.
      correct: examples whose class has the largest logit; with several labels, the sum of the
        examples' shares of classes whose logit has the right sign.
      top5: examples whose class has one of the five largest; None with several labels.
      examples: their number.
      custom: values of the recipe's metrics, by name.
    """

    loss: Any
    correct: Any
    top5: Any
    examples: Any
    custom: Mapping[str, Any] = {}

    @classmethod
    def of_batch(
        cls,
        logits: Float[jax.Array, "b k"],
        targets: Int[ArrayLike, " b"] | Int[ArrayLike, "b k"],
        mask: Bool[ArrayLike, " b"],
        loss: LossChoice = "cross_entropy",
        metrics: Sequence[str] = (),
    ) -> "Metrics":
        """Returns the metrics of logits and targets, over the rows in the mask.

        With five classes or fewer every row is among the top five. One whose own logit is NaN is no
        hit, though `argmax` finds it: a network that has diverged must not score.

        Args:
          logits: a row per example.
          targets: classes, or 0 or 1 for each class.
          mask: False for padding.
          loss: loss of an example.
          metrics: functions of the user, see `jaxft.example_function`.
        """
        targets, mask = jnp.asarray(targets), jnp.asarray(mask)
        if targets.ndim == 2:
            targets = targets.astype(logits.dtype)
        losses = example_losses(loss, logits, targets)
        # Within a fusion XLA may drop NaN from the loss on CPU.
        has_nan = jnp.isnan(logits).any(-1)
        losses = jnp.where(has_nan, jnp.nan, losses)
        rank = _rank(logits, targets) if targets.ndim == 1 else None
        return cls(
            loss=jnp.sum(losses, where=mask),
            correct=_correct_labels(logits, targets, mask)
            if rank is None
            else jnp.sum((logits.argmax(-1) == targets) & (rank == 0), where=mask),
            top5=None if rank is None else jnp.sum(rank < min(5, logits.shape[-1]), where=mask),
            examples=jnp.sum(mask),
            custom={
                example_function.function_name(name): jnp.sum(
                    jnp.where(has_nan, jnp.nan, _values(name, logits, targets)), where=mask
                )
                for name in metrics
            },
        )

    @classmethod
    def total(cls, batches: Iterable["Metrics"]) -> "Metrics":
        """Returns the sum over many batches, stacked or not; added on the host in float64."""
        fetched = jax.device_get(list(batches))
        leaves, structure = map(jax.tree.leaves, fetched), jax.tree.structure(fetched[0])
        rows = [np.reshape(arrays, (len(arrays), -1)) for arrays in leaves]
        sums = np.concatenate(rows, 1, dtype=np.float64).sum(1).tolist()
        summed: Metrics = jax.tree.unflatten(structure, sums)
        return summed

    def plus(self, other: "Metrics") -> "Metrics":
        """Adds a batch on the host, in float64."""
        pairs = zip(self[:-1], other[:-1], strict=True)
        sums = (None if b is None else a + float(b) for a, b in pairs)  # top5 may be None
        loss, correct, top5, examples = sums
        return Metrics(loss, correct, top5, examples, _added(self.custom, other.custom))

    @property
    def score(self) -> Score:
        """The means over the examples; NaN without any."""

        def mean(total: Any) -> float:
            return float(total / self.examples) if self.examples else math.nan

        custom = {name: mean(total) for name, total in self.custom.items()}
        top5 = None if self.top5 is None else mean(self.top5)
        return Score(mean(self.loss), mean(self.correct), top5, custom)


def _rank(logits: Float[jax.Array, "b k"], targets: Int[jax.Array, " b"]) -> Int[jax.Array, " b"]:
    """Returns the number of logits above that of the row's class; NaN is above all numbers."""
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return jnp.sum(~(logits <= target_logits), axis=-1)


def _correct_labels(
    logits: Float[jax.Array, "b k"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
) -> Float[jax.Array, ""]:
    """Returns the sum of each row's share of labels that the sign of the logit predicts."""
    hits = jnp.where(targets == 1, logits > 0, logits <= 0)  # NaN predicts neither
    # A sum of integers does not depend on padding and on the number of devices.
    return jnp.sum(hits, where=mask[:, None]) / logits.shape[-1]


def _values(
    name: str,
    logits: Float[jax.Array, "b k"],
    targets: Int[jax.Array, " b"] | Float[jax.Array, "b k"],
) -> Float[jax.Array, " b"]:
    """Returns the values of a metric of the user."""
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return example_function.call(name, logits, targets).astype(logits.dtype)


_ZERO = Metrics(0.0, 0.0, 0.0, 0.0)


class StepRecord(NamedTuple):
    """Metrics of one training step; norms are L2, by group, and scalars.

    Attributes:
      metrics: of the batch.
      gradient_norms: before clipping.
      update_norms: of the change to the parameters.
      finite: whether logits, loss, gradients, updates and new running statistics are finite.
      gradients: before clipping, where the step was built with `keep_gradients`.
      weight: sum of the images' weights, by which a mean loss divides.
    """

    metrics: Metrics
    gradient_norms: dict[str, jax.Array]
    update_norms: dict[str, jax.Array]
    finite: jax.Array
    gradients: Tree = None
    weight: jax.Array | None = None


class GradientNorms(NamedTuple):
    """L2 norms of gradients and weights by label, scalars."""

    gradients: dict[str, jax.Array]
    weights: dict[str, jax.Array]


@dataclass(frozen=True)
class EpochMetrics:
    """Sums over the steps of an epoch so far; a checkpoint within an epoch holds them.

    Steps are added one by one in float64, so that an interrupted epoch has the same sums.

    Attributes:
      lr: learning rate of the epoch's first step, by group.
      metrics: sums over the examples.
      gradient_norms, update_norms: sums over the steps, by group; see `StepRecord`.
      steps: number of steps taken.
      skipped: number of steps left out, because something was not finite.
      seconds: duration of the steps.
      idle: seconds in which the device waited for images.
    """

    lr: Mapping[str, float] = field(default_factory=dict)
    metrics: Metrics = _ZERO
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    update_norms: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    idle: float = 0.0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "EpochMetrics":
        """Inverts `dataclasses.asdict`, also after a detour through JSON."""
        return cls(**{**fields, "metrics": Metrics(*fields["metrics"])})

    def plus(self, records: Iterable[StepRecord], *, seconds: float, idle: float) -> "EpochMetrics":
        """Adds further steps, fetched from the device, and their time in seconds."""
        total = dataclasses.replace(self, seconds=self.seconds + seconds, idle=self.idle + idle)
        for record in records:
            finite = bool(record.finite)
            total = dataclasses.replace(
                total,
                metrics=total.metrics.plus(record.metrics),
                gradient_norms=_added(total.gradient_norms, record.gradient_norms),
                update_norms=_added(total.update_norms, record.update_norms),
                steps=total.steps + finite,
                skipped=total.skipped + (not finite),
            )
        return total

    def row(
        self, stage: str, *, epoch: int, step: int, validated: Score, seconds: float
    ) -> dict[str, Any]:
        """Returns the epoch's row of `metrics.jsonl`.

        Args:
          stage: name of the stage.
          epoch: number of the epoch in the stage, from 1.
          step: global step at its end.
          validated: validation score after it.
          seconds: duration with validation.
        """
        trained = self.metrics.score
        return {
            "stage": stage,
            "epoch": epoch,
            "step": step,
            **{f"train_{name}": value for name, value in trained.values.items()},
            **{f"val_{name}": value for name, value in validated.values.items()},
            "lr": dict(self.lr),
            "gradient_norms": self._mean(self.gradient_norms),
            "update_norms": self._mean(self.update_norms),
            "skipped_steps": self.skipped,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": seconds,
            "step_seconds": self.seconds - self.idle,
            "images_per_second": self.metrics.examples / self.seconds if self.seconds else 0.0,
            "input_wait_seconds": self.idle,
            "peak_memory_mib": _peak_memory_mib(),
        }

    def input_advice(
        self, epoch: int, *, threads: int, processes: int, cores: int, cached: bool
    ) -> str | None:
        """Returns a sentence if reading images slows the run and something can be done about it.

        Args:
          epoch: number of the epoch in the stage, from 1; in the first one the cache only fills.
          threads: threads that read images.
          processes: processes that read images in place of the threads, or 0.
          cores: cores of the machine.
          cached: whether all training images are in memory.
        """
        is_short = self.idle < _SLOW_SECONDS or self.idle < _SLOW_SHARE * self.seconds
        if epoch == 1 or is_short:
            return None
        ways = []
        if processes and processes < cores:
            ways = ["more processes (--worker-processes)"]
        elif not processes and _MAX_THREADS <= threads < cores:
            ways = ["processes in place of threads (--worker-processes)"]
        elif not processes and threads < cores:
            ways = ["more workers (--workers)"]
        ways += [] if cached else ["a larger --cache-mib"]
        if not ways:
            return None
        share = self.idle / self.seconds
        return f"Reading images took {share:.0%} of epoch {epoch}: {' or '.join(ways)} would help."

    def _mean(self, norms: Mapping[str, float]) -> dict[str, float]:
        return {group: x / self.steps if self.steps else math.nan for group, x in norms.items()}


def _added(sums: Mapping[str, float], more: Mapping[str, Any]) -> dict[str, float]:
    return {group: sums.get(group, 0.0) + float(x) for group, x in more.items()}


def _peak_memory_mib() -> float:
    """Returns the peak of the first device, or of the process where devices do not report it."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"] / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
