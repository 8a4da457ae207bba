"""A run: what stays the same from its first stage to its last."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import jax

from jaxft import data
from jaxft import recipe as recipes
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.data import Batch, Source, Splits
from jaxft.data.fingerprint import record
from jaxft.distributed import Devices
from jaxft.errors import InterruptedRunError
from jaxft.labels import Tree
from jaxft.processes import agree
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.report.metrics_log import MetricsLog
from jaxft.train.batch_sizes import batch_sizes
from jaxft.train.execution import groups, sent
from jaxft.train.feature_cache import Inputs, Kept
from jaxft.train.interruption import Interruption
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.stage_program import Program
from jaxft.train.state import Progress, header_of

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
      programs: one a stage.
      eval_step: see `jaxft.train.eval_step.eval_step`.
      start: the parameters that the run started from, if a stage has an anchor.
      kept: what stages keep of their prefixes.
      seen: batches to validate, in memory; likely the same.
    """

    recipe: Recipe
    splits: Splits
    programs: tuple[Program, ...]
    devices: Devices
    eval_step: Callable[[Tree, Tree, Batch], Metrics]
    checkpoints: Checkpoints
    metrics: MetricsLog
    console: Console
    interruption: Interruption
    start: Tree | None
    kept: Kept
    seen: Kept

    @cached_property
    def data(self) -> dict[str, object]:
        """Facts of the images that must match on resume: see `jaxft.data.fingerprint.record`."""
        return record(self.splits)

    def save(
        self,
        progress: Progress,
        epoch_metrics: EpochMetrics,
        items: Mapping[str, Tree],
        *,
        keep: bool = False,
    ) -> None:
        """Starts to write a checkpoint; see `Checkpoints.save`."""
        header = header_of(
            progress,
            epoch_metrics,
            data=self.data,
            recipe=recipes.fields(self.recipe),
            rows=self.metrics.rows,
        )
        self.checkpoints.save(progress.step, header.to_json(), items, keep=keep)

    def stop_asked(self) -> bool:
        """Whether a signal has come, to any process; all must ask, at the same point."""
        return agree(self.interruption.signal is not None)

    def evaluate(self, params: Tree, stats: Tree, inputs: Inputs | None = None) -> Score | None:
        """The score on the validation images, each counted once; none if a signal has come.

        inputs: what the images have become, to begin with.
        """
        val, places = self.splits.val, self.recipe.steps_per_execution
        if inputs is None or inputs.score is None:
            step = partial(self.eval_step, params, stats)
            batches = self.of_each_batch(val, step, places=places, replayed=True)
        elif (rows := inputs.val()) is None:
            return None
        else:
            step = partial(inputs.score, params, stats)
            size = inputs.batch_size
            batches = self.of_each_batch(val, step, batch_size=size, places=places, kept=rows)
        return None if batches is None else Metrics.total(batches).score

    def of_each_batch(
        self,
        source: Source,
        step: Callable[..., T],
        *,
        batch_size: int | None = None,
        places: int = 1,
        replayed: bool = False,
        **instead: Any,
    ) -> list[T] | None:
        """What a compiled step makes of the source's images in their order, each seen once.

        With more `places` than one it is given up to so many batches, stacked, and their number
        (see `jaxft.train.execution`). `batch_size` is the recipe's by default; for what may be
        `instead` of the images as they are evaluated see `jaxft.data.eval_batches`. Those to
        validate may be `replayed` from memory. None if a signal has come.
        """
        recipe, size = self.recipe, batch_size or self.recipe.batch_size
        sizes = batch_sizes(self.programs[0].model, self.devices, len(source), size)
        batches = data.eval_batches(
            source,
            recipe.preprocessing,
            batch_size=size,
            workers=recipe.workers,
            rows=sizes.rows,
            last_rows=sizes.last_rows,
            shard=self.devices.shard,
            **instead,
        )
        if replayed:
            count = data.steps_per_epoch(source, size)
            batches = self.seen.replayed(("images", size), batches, count)
        made: list[T] = []
        with closing(batches):
            for index, group in enumerate(groups(batches, places)):
                made.append(step(*sent(self.devices, group, places)))
                jax.block_until_ready(made[-2:-1])  # or the host fills the device ahead
                if index * places % recipe.sync_steps < places and self.stop_asked():
                    return None
        return made

    def stopped(self) -> InterruptedRunError:
        """The error of a run that has been asked to stop, and has nothing to save."""
        saved = self.checkpoints.latest_step()
        where = f"step {saved} is saved" if saved else "nothing has been trained yet"
        return self.interruption.error(f"came, and {where}. The same command goes on from there")
