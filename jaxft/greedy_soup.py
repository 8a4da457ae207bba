"""Greedy soup: averages the weights of several runs while the validation accuracy does not fall.

Reference: Wortsman et al. 2022 (arXiv:2203.05482).
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import export, recipe_file, weights
from jaxft.batch_sizes import BatchSizes, batch_sizes
from jaxft.checkpoint import atomic
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Arrays, Header, Snapshot
from jaxft.data import Batch, Source, Splits, eval_batches
from jaxft.data.fingerprint import changes, record
from jaxft.devices import Devices
from jaxft.errors import CheckpointError, DataError, RecipeError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.models.lora_model import without_lora
from jaxft.models.model import OPTIONS
from jaxft.models.norm_modes import layer
from jaxft.open_recipe import close_splits, open_network, open_splits
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.train.eval_step import image_eval_step
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.norm_statistics import statistics_step
from jaxft.train.state import Progress, header_of
from jaxft.train.workdir import read_run

Weights = tuple[Tree, Tree]
"""Parameters and statistics, as NumPy arrays or on the devices."""

_ROW = "  {:44}  {:>10}  {:>10}  {}"
# Fields of a recipe that the runs must share for their weights to have the same meaning. Dropout
# and drop path act in training only.
_NETWORK = (
    *("model", *({*OPTIONS} - {"dropout", "drop_path"})),
    *("image_size", "resize_size", "resize_mode", "interpolation", "mean", "std"),
)


@dataclass(frozen=True)
class Ingredient:
    """A run that was tried.

    Attributes:
      run: its folder.
      score: its validation score alone.
      soup_score: validation score of the average that includes this run.
      is_kept: whether it is part of the soup.
    """

    run: str
    score: Score
    soup_score: Score
    is_kept: bool


@dataclass(frozen=True)
class Soup:
    """Result of `soup`.

    Attributes:
      score: validation score of the soup.
      ingredients: the runs, the best first.
      weights: safetensors file; `model.json` is in the same folder.
    """

    score: Score
    ingredients: tuple[Ingredient, ...]
    weights: Path


def soup(
    runs: Sequence[str | PathLike[str]],
    workdir: str | PathLike[str],
    *,
    data: Source | Splits | str | None = None,
    model: Model | None = None,
    console: Console | None = None,
) -> Soup:
    """Averages the weights of runs greedily, and writes the average as a finished run.

    The runs are sorted by accuracy, ties by loss. Starting from the best, each run joins the
    average unless the validation accuracy falls. In norm layers whose statistics differ between
    the averaged runs, they are computed again from the training images, see
    `jaxft.train.norm_statistics`. The runs should start from the same pretrained weights, or else
    their average is of no use.

    Args:
      runs: folders of runs that have ended, with the same network and classes.
      workdir: new folder, which can be used as the folder of a run that has ended.
      data: the images, if the runs received `data`; or a string as `Recipe.data`, to use other
        images with the same classes.
      model: the network, if the runs received one.
      console: where to print.

    Raises:
      CheckpointError: a folder holds no run that has ended.
      DataError: the runs have different classes, or validated with different images.
      RecipeError: there are fewer than two runs, they have different networks, or `workdir` is
        not empty.
    """
    if jax.process_count() > 1:
        raise RecipeError("a soup needs a single process; it has been started in several.")
    folders, folder = [atomic.anywhere(run) for run in runs], atomic.anywhere(workdir)
    if len({*folders}) < max(2, len(folders)):
        raise RecipeError(
            f"a soup needs at least two runs, each once: {', '.join(map(str, folders))}."
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RecipeError(f"{folder} is not empty; choose another --workdir.")
    console = console or Console()
    recipes, headers = zip(*map(read_run, folders), strict=True)
    for run, header in zip(folders, headers, strict=True):
        _check_ended(run, header)
    recipe = _shared_recipe(folders, recipes)
    if isinstance(data, str):
        recipe = dataclasses.replace(
            recipe, data=data, split_by=None, train_split=None, val_split=None, shots=None
        )
    splits = open_splits(recipe, None if isinstance(data, str) else data)
    try:
        for remark in splits.remarks:
            console.say(remark)
        facts = record(splits)
        for run, header in zip(folders, headers, strict=True):
            _check_images(run, header.data, facts, check_val=not isinstance(data, str))
        network = without_lora(open_network(recipe, model, splits.train.classes))
        evaluator = _Evaluator(recipe, network, splits, Devices(recipe.sharding))
        tried, trees = _greedy(folders, evaluator, console)
    finally:
        close_splits(splits)
    score = [each.soup_score for each in tried if each.is_kept][-1]
    progress = Progress.at_start(
        len(recipe.stages) - 1, Progress.from_fields(headers[0].progress).step, score
    )
    progress = dataclasses.replace(progress, ended=f"a soup of {len(tried)} runs")
    header = header_of(
        progress, EpochMetrics(), data=facts, recipe=recipe_file.fields(recipe), rows=[]
    )
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        items = Arrays(Snapshot(*trees, ())).to_items()
        checkpoints.save(progress.step, header.to_json(), items, keep=True)
    path = export.write(
        folder, recipe, network, *trees, classes=splits.train.classes, score=score,
        pixels=facts["pixels"], multi_label=facts["multi_label"],
    )  # fmt: skip
    return Soup(score, tuple(tried), path)


def _greedy(
    folders: Sequence[Path], evaluator: "_Evaluator", console: Console
) -> tuple[list[Ingredient], Weights]:
    """Returns the runs in the order in which they were tried, and the weights of the soup."""
    loaded: dict[Path, Weights] = {}
    alone: dict[Path, Score] = {}
    for run in folders:
        loaded[run] = jax.device_get(weights.load(run, evaluator.model))
        alone[run] = evaluator.score(loaded[run])
    kept, soup, best = list[Weights](), loaded[folders[0]], -1.0
    tried = list[Ingredient]()
    console.row(_ROW.format("run", "alone", "soup", ""))
    for run in sorted(folders, key=lambda run: (-alone[run].accuracy, alone[run].loss)):
        candidate, score = loaded[run], alone[run]
        if kept:
            candidate = evaluator.average([*kept, loaded[run]])
            score = evaluator.score(candidate)
        is_kept = score.accuracy >= best
        tried.append(Ingredient(str(run), alone[run], score, is_kept))
        if is_kept:
            kept.append(loaded[run])
            soup, best = candidate, score.accuracy
        console.row(_row(tried[-1]))
    return tried, soup


def _row(tried: Ingredient) -> str:
    """Returns a row of the table; long paths are cut at the left."""
    scores = (f"{score.accuracy:.4f}" for score in (tried.score, tried.soup_score))
    return _ROW.format(tried.run[-44:], *scores, "kept" if tried.is_kept else "left out")


@dataclass(frozen=True)
class _Evaluator:
    """Averages and scores weights of a recipe's network on its images."""

    recipe: Recipe
    model: Model
    splits: Splits
    devices: Devices

    def average(self, trees: Sequence[Weights]) -> Weights:
        """Returns the mean of the weights; statistics that differ are re-estimated."""

        def mean(*leaves: np.ndarray) -> np.ndarray:
            averaged = np.mean(leaves, axis=0, dtype=np.float64)  # equal values stay equal
            return np.asarray(averaged, leaves[0].dtype)

        params, stats = jax.tree.map(mean, *trees)
        layers = {
            layer(path)
            for path, *leaves in zip(
                paths(stats), *(jax.tree.leaves(each) for _, each in trees), strict=True
            )
            if any(not np.array_equal(leaves[0], leaf) for leaf in leaves)
        }
        if not layers:
            return params, stats
        placed_params, placed_stats = self.devices.put((params, stats))
        sizes = self._sizes(self.splits.train)
        step = statistics_step(
            self.model, self.recipe.preprocessing, self.devices, layers,
            examples=sizes.examples, precision=self.recipe.matmul_precision,
        )  # fmt: skip
        for number, batch in enumerate(self._batches(self.splits.train), 1):
            placed_stats = step(placed_params, placed_stats, batch, np.int32(number))
            jax.block_until_ready(placed_stats)
        return params, jax.device_get(placed_stats)

    def score(self, trees: Weights) -> Score:
        """Returns the validation score of weights."""
        placed = self.devices.put(trees)
        metrics = []
        for batch in self._batches(self.splits.val):
            metrics.append(self._eval_step(*placed, batch))
            jax.block_until_ready(metrics[-2:-1])  # limits the batches queued on the device
        return Metrics.total(metrics).score

    @cached_property
    def _eval_step(self) -> Any:
        recipe = dataclasses.replace(self.recipe, steps_per_execution=1)
        loss = recipe.settings(recipe.stages[-1]).loss
        return image_eval_step(recipe, self.model, self._sizes(self.splits.val), loss)

    def _sizes(self, source: Source) -> BatchSizes:
        return batch_sizes(self.model, self.devices, len(source), self.recipe.batch_size)

    def _batches(self, source: Source) -> Generator[Batch, None, None]:
        """Yields the batches of the evaluation view on the devices."""
        sizes, recipe = self._sizes(source), self.recipe
        batches = eval_batches(
            source, recipe.preprocessing, batch_size=recipe.batch_size, workers=recipe.workers,
            rows=sizes.rows, last_rows=sizes.last_rows,
        )  # fmt: skip
        with closing(batches):
            for batch in batches:
                yield self.devices.batch(batch)


def _check_ended(folder: Path, header: Header) -> None:
    """Raises CheckpointError unless the run has ended."""
    progress = Progress.from_fields(header.progress)
    if not progress.ended or progress.stage < len(header.recipe["stages"]) - 1:
        stage = header.recipe["stages"][progress.stage]["name"]
        raise CheckpointError(
            f"the run in {folder} has not ended: stage {stage!r}, after epoch {progress.epoch}. "
            "Resume it, or leave it out."
        )


def _shared_recipe(folders: Sequence[Path], recipes: Sequence[Recipe]) -> Recipe:
    """Returns the recipe of the first run.

    Raises:
      RecipeError: another run has another network.
    """
    first = recipes[0]
    for run, recipe in zip(folders, recipes, strict=True):
        differing = [
            f"{name} is {getattr(recipe, name)!r}, not {getattr(first, name)!r}"
            for name in _NETWORK
            if getattr(recipe, name) != getattr(first, name)
        ]
        if differing:
            raise RecipeError(f"{run} and {folders[0]} cannot be averaged: {'; '.join(differing)}.")
    return first


def _check_images(
    run: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, check_val: bool
) -> None:
    """Checks the classes, and the validation images unless the user chose others.

    Raises:
      DataError: they differ.
    """
    ignored = ("train:",) if check_val else ("train:", "val:")
    changed = [line for line in changes(before, now) if not line.startswith(ignored)]
    listing = "".join(f"\n  {line}" for line in changed)
    if changed and check_val:
        raise DataError(
            f"{run} has validated with other images ('then'):{listing}\nA soup needs runs with the "
            "same classes and validation images; without a val_split, the seed may draw them. "
            "Other images of these classes: --data."
        )
    if changed:
        raise DataError(f"the data given has other classes than {run} ('then'):{listing}")
