"""What a run says on the terminal: a table before each stage, a row an epoch, a sentence after."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
from rich import box
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.models import NormMode
from jaxft.stages import StagePlan

EPOCH_ROW = "{:>7}  {:>10}  {:>10}  {:>10}  {:>9}  {}"


class Console:
    """Prints the story of a run. `quiet` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = Terminal(quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line, as it is."""
        self._out.print(text, markup=False, soft_wrap=True)

    def stage(
        self, plan: StagePlan, title: str, params: Tree, norms: Mapping[str, NormMode]
    ) -> None:
        """The table of a stage: who trains, how fast, and what its norm layers use."""
        labels = leaf_labels(params, plan.labels)
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        total = sum(sizes)
        modes: dict[str, Counter[str]] = {}
        for path, label in zip(paths(params), labels, strict=True):
            layer, _, leaf = path.rpartition(".")
            if layer in norms and leaf == "scale":
                modes.setdefault(label, Counter())[norms[layer]] += 1

        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
        table.add_column("group", overflow="fold")
        for heading in ("parameters", "share", "rate"):
            table.add_column(heading, justify="right")
        table.add_column("norm statistics")
        for group in dict.fromkeys([*plan.rates, *sorted(set(labels) - {FROZEN}), FROZEN]):
            count = sum(s for s, label in zip(sizes, labels, strict=True) if label == group)
            if not count:
                continue
            rate = f"{plan.rates[group]:g}" if group in plan.rates else "-"
            shown = ", ".join(f"{mode} ({n})" for mode, n in modes.get(group, {}).items())
            style = "dim" if group == FROZEN else None
            table.add_row(
                group, f"{count:,}", f"{count / total:.1%}", rate, shown or "-", style=style
            )
        self._out.print(table)
        heads = ("epoch", "train loss", "val loss", "accuracy", "seconds", "")
        self.say(EPOCH_ROW.format(*heads).rstrip())

    @contextmanager
    def epoch(self, epoch: int, steps: int) -> Iterator["Bar"]:
        """A bar over the steps of an epoch, on a terminal only; it leaves nothing behind."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        shown = self._out.is_terminal and not self._out.quiet
        with Progress(*columns, console=self._out, transient=True, disable=not shown) as progress:
            yield Bar(progress, progress.add_task(f"epoch {epoch}", total=steps, loss=float("nan")))

    def epoch_row(
        self,
        epoch: int,
        train_loss: float | None,
        val_loss: float,
        accuracy: float,
        seconds: float | None,
        remark: str = "",
    ) -> None:
        """A row of the stage's growing table."""
        cells = (
            epoch or "start",
            "-" if train_loss is None else f"{train_loss:.4f}",
            f"{val_loss:.4f}",
            f"{accuracy:.4f}",
            "-" if seconds is None else f"{seconds:.1f}",
            remark,
        )
        self.say(EPOCH_ROW.format(*cells).rstrip())


class Bar:
    """The progress of one epoch."""

    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    @property
    def shown(self) -> bool:
        """Whether anyone sees it: else a loss need not be fetched from the device."""
        return not self._progress.disable

    def advance(self, loss: float) -> None:
        """One step further."""
        self._progress.update(self._task, advance=1, loss=loss)  # type: ignore[arg-type]
