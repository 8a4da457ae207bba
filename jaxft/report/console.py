"""Prints a run on the terminal: a table before each stage, a row per epoch, remarks between."""

import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain

import jax
from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.stage_plan import StagePlan
from jaxft.train.metrics import Score

EPOCH_ROW = "{:>7}  {:>10}  {:>10}  {:>10}{}  {:>9}  {}"
_EPOCH_ROOM = 62  # columns of a row without the recipe's metrics, with a short remark


class _Output(Terminal):
    """Standard output; an error in writing to it stops the output, not the run."""

    def on_broken_pipe(self) -> None:
        """Stops the output; Rich would also end the program."""
        with suppress(SystemExit, OSError):
            super().on_broken_pipe()
        self.stop("the reader of standard output has closed it")

    def stop(self, reason: str) -> None:
        """Prints nothing from now on, and explains this on standard error."""
        self.quiet = True
        with suppress(OSError, AttributeError):  # standard error may be closed too
            sys.stderr.write(f"Output stops: {reason}. The command continues.\n")


class Console:
    """Prints a run; with `quiet`, nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        # Names that users choose, such as folder:cat or a class [bold], are no markup or emoji.
        self._out = _Output(quiet=quiet, highlight=False, markup=False, emoji=False)
        self._columns: dict[str, int] = {}  # width of each metric in the table of epochs, by name

    @property
    def terminal(self) -> Terminal | None:
        """Where it prints; None if it prints nothing."""
        return None if self._out.quiet else self._out

    def say(self, text: str, style: str | None = None) -> None:
        """Prints text, wrapped at the width of the terminal except for indented lines."""
        for line in text.split("\n"):
            is_indented = line.startswith(" ")
            self.row(line if is_indented else textwrap.fill(line, self._out.width), style)

    def row(self, text: str, style: str | None = None) -> None:
        """Prints a line of a table without wrapping it."""
        # A path may contain bytes that are not UTF-8 and cannot be printed.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        try:
            self._out.print(text.rstrip(), style=style, soft_wrap=True)
        except OSError as error:
            self._out.stop(f"standard output cannot be written: {error.strerror}")

    def stage(
        self,
        plan: StagePlan,
        title: str,
        cost: str,
        params: Tree,
        norms: Mapping[str, str],
        *,
        metrics: Sequence[str] = (),
    ) -> None:
        """Prints the table of a stage and the header of its epochs.

        The table has a row per group: parameters, learning rate, schedule and norm modes.

        Args:
          plan: the stage.
          title: heading of the table.
          cost: text about the cost of a step.
          params: all parameters.
          norms: the mode of each norm layer, by path.
          metrics: names of the recipe's metrics, which have a column each as far as there is room.
        """
        rows = [("group", "parameters", "share", "lr", "schedule", "norm layers")]
        rows += group_rows(plan, params, norms)
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        line = "  {:{}}  {:>{}}  {:>{}}  {:>{}}  {:{}}  {:{}}"
        self.row(f"\n{title}", style="bold")
        self.say(cost)
        self.row("")
        for row in rows:
            padded = chain.from_iterable(zip(row, widths, strict=True))
            self.row(line.format(*padded), style="dim" if row[0] == FROZEN else None)
        sizes = [max(10, len(name)) for name in metrics]
        room, ends = self._out.width - _EPOCH_ROOM, accumulate(2 + size for size in sizes)
        columns = zip(metrics, sizes, ends, strict=True)
        self._columns = {name: size for name, size, end in columns if end <= room}
        cells = self._cells({name: name for name in metrics})
        header = ("epoch", "train loss", "val loss", "accuracy", cells, "seconds", "")
        self.row("\n" + EPOCH_ROW.format(*header))

    @contextmanager
    def epoch(self, epoch: int, steps: int, done: int = 0) -> Iterator["Bar"]:
        """Shows a progress bar over the steps of an epoch, on a terminal only.

        Args:
          epoch: number of the epoch.
          steps: its number of steps.
          done: number of steps that are complete already.
        """
        columns = (
            TextColumn("  epoch {task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        hidden = self._out.quiet or not self._out.is_terminal
        with Progress(*columns, console=self._out, transient=True, disable=hidden) as progress:
            task = progress.add_task(str(epoch), total=steps, completed=done, loss="-")
            yield Bar(progress, task)

    def epoch_row(
        self,
        epoch: int | str,
        train_loss: float | None,
        score: Score,
        seconds: float | None,
        remark: str = "",
    ) -> None:
        """Prints one row of the stage's table of epochs.

        Args:
          epoch: number of the epoch, 0 for the start of the stage, or a word for a candidate.
          train_loss: mean training loss of the epoch; None if there is none.
          score: validation score.
          seconds: duration of the epoch in seconds; None if unknown.
          remark: text at the end of the row.
        """
        cells = (
            epoch or "start",
            "-" if train_loss is None else _format_loss(train_loss),
            _format_loss(score.loss),
            f"{score.accuracy:.4f}",
            self._cells({name: _format_loss(value) for name, value in score.custom.items()}),
            "-" if seconds is None else f"{seconds:.1f}",
            remark,
        )
        self.row(EPOCH_ROW.format(*cells))

    def _cells(self, texts: Mapping[str, str]) -> str:
        """Returns the cells of the recipe's metrics in a row of the table of epochs."""
        return "".join(f"  {texts[name]:>{width}}" for name, width in self._columns.items())


def group_rows(
    plan: StagePlan, params: Tree, norms: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yields the cells of a stage's table for each group; the frozen parameters come last."""
    labels = leaf_labels(params, plan.labels)
    sizes, modes, counted_layers = Counter[str](), dict[str, Counter[str]](), set[str]()
    for path, label, leaf in zip(paths(params), labels, jax.tree.leaves(params), strict=True):
        sizes[label] += leaf.size
        layer = path.rpartition(".")[0]
        if layer in norms and layer not in counted_layers:
            modes.setdefault(label, Counter())[norms[layer]] += 1
            counted_layers.add(layer)
    updates = plan.updates()
    for group in [*plan.patterns, *([FROZEN] if FROZEN in sizes else [])]:
        lr, schedule = "-" if group == FROZEN else "solved", "-"
        if group in updates:
            lr = f"{'up to ' * plan.stage.auto_rgn}{updates[group].lr:.3g}"
            schedule = type(updates[group].schedule).__name__
        group_modes = ", ".join(f"{mode} ({n})" for mode, n in modes.get(group, {}).items())
        share = f"{sizes[group] / sizes.total():.1%}"
        yield group, f"{sizes[group]:,}", share, lr, schedule, group_modes or "-"


def _format_loss(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.3e}"


class Bar:
    """Progress bar of one epoch."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, loss: float, steps: int) -> None:
        """Advances by a number of steps and shows the loss, which is NaN until it is known."""
        text = "-" if math.isnan(loss) else _format_loss(loss)
        self._progress.update(self._task, advance=steps, loss=text)
