"""What a run says on the terminal: a table before each stage, a row an epoch, a sentence after."""

import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain

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

EPOCH_ROW = "{:>7}  {:>10}  {:>10}  {:>10}  {:>9}  {}"


class _Output(Terminal):
    """Standard output, whose loss does not end a run: a run is worth more than its lines."""

    def on_broken_pipe(self) -> None:
        """Sends further lines nowhere; Rich would end the program besides."""
        with suppress(SystemExit, OSError):
            super().on_broken_pipe()
        self.lost("its reader has gone")

    def lost(self, reason: str) -> None:
        """Prints nothing from here on, and says so on standard error."""
        self.quiet = True
        with suppress(OSError, AttributeError):  # which may be closed, too
            sys.stderr.write(f"Nothing more is printed, as {reason}; the run goes on.\n")


class Console:
    """Prints the story of a run. `quiet` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        # What users name, such as folder:cat or a class [bold], is no markup and no emoji.
        self._out = _Output(quiet=quiet, highlight=False, markup=False, emoji=False)

    def say(self, text: str, style: str | None = None) -> None:
        """Prose, wrapped at the width of the terminal; its indented lines stay as they are."""
        for line in text.split("\n"):
            listed = line.startswith(" ")
            self.row(line if listed else textwrap.fill(line, self._out.width), style)

    def row(self, text: str, style: str | None = None) -> None:
        """A line of a table, as wide as it is."""
        # Paths may hold bytes that are not UTF-8, which a terminal of UTF-8 does not take.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        try:
            self._out.print(text.rstrip(), style=style, soft_wrap=True)
        except OSError as error:
            self._out.lost(f"standard output cannot be written: {error.strerror}")

    def stage(
        self, plan: StagePlan, title: str, cost: str, params: Tree, norms: Mapping[str, str]
    ) -> None:
        """The table of a stage: who trains, how fast, and the modes of its norm layers, by path."""
        labels = leaf_labels(params, plan.labels)
        sizes, modes, seen = Counter[str](), dict[str, Counter[str]](), set[str]()
        for path, label, leaf in zip(paths(params), labels, jax.tree.leaves(params), strict=True):
            sizes[label] += leaf.size
            layer = path.rpartition(".")[0]
            if layer in norms and layer not in seen:
                modes.setdefault(label, Counter())[norms[layer]] += 1
                seen.add(layer)

        updates = plan.updates()
        rows = [("group", "parameters", "share", "rate", "schedule", "norm layers")]
        for group in [*plan.patterns, *([FROZEN] if FROZEN in sizes else [])]:
            rate, schedule = "-" if group == FROZEN else "solved", "-"
            if group in updates:
                rate = f"{'up to ' * plan.stage.relative_rates}{updates[group].lr:g}"
                schedule = type(updates[group].schedule).__name__
            used = ", ".join(f"{mode} ({n})" for mode, n in modes.get(group, {}).items())
            share = f"{sizes[group] / sizes.total():.1%}"
            rows.append((group, f"{sizes[group]:,}", share, rate, schedule, used or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        line = "  {:{}}  {:>{}}  {:>{}}  {:>{}}  {:{}}  {:{}}"
        self.row(f"\n{title}", style="bold")
        self.say(cost)
        self.row("")
        for row in rows:
            cells = chain.from_iterable(zip(row, widths, strict=True))
            self.row(line.format(*cells), style="dim" if row[0] == FROZEN else None)
        heads = ("epoch", "train loss", "val loss", "accuracy", "seconds", "")
        self.row("\n" + EPOCH_ROW.format(*heads))

    @contextmanager
    def epoch(self, epoch: int, steps: int, done: int = 0) -> Iterator["Bar"]:
        """A bar over the steps of an epoch, on a terminal only; it leaves nothing behind."""
        columns = (
            TextColumn("  epoch {task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        shown = self._out.is_terminal and not self._out.quiet
        with Progress(*columns, console=self._out, transient=True, disable=not shown) as progress:
            task = progress.add_task(str(epoch), total=steps, completed=done, loss="-")
            yield Bar(progress, task)

    def epoch_row(
        self,
        epoch: int | str,
        train_loss: float | None,
        val_loss: float,
        accuracy: float,
        seconds: float | None,
        remark: str = "",
    ) -> None:
        """A row of the stage's growing table; epoch 0 is its start, a word a candidate's."""
        cells = (
            epoch or "start",
            "-" if train_loss is None else _loss(train_loss),
            _loss(val_loss),
            f"{accuracy:.4f}",
            "-" if seconds is None else f"{seconds:.1f}",
            remark,
        )
        self.row(EPOCH_ROW.format(*cells))


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.3e}"


class Bar:
    """The progress of one epoch."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, loss: float, steps: int) -> None:
        """Moves on by a number of steps; the loss is NaN until it is known."""
        shown = "-" if math.isnan(loss) else _loss(loss)
        self._progress.update(self._task, advance=steps, loss=shown)
