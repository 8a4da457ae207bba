"""Compares fine-tuning strategies on the user's images: runs each over seeds, and ranks them."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy.stats import t as student_t

from jaxft import recipe_file
from jaxft.checkpoint import atomic
from jaxft.data import Source, Splits
from jaxft.data.fingerprint import changes, record
from jaxft.default_stages import EPOCHS, LR, default_stages, names
from jaxft.errors import DataError, NonFiniteError, RecipeError
from jaxft.labels import FROZEN, leaf_labels
from jaxft.models import Model
from jaxft.models.nnx_adapter import init_shapes
from jaxft.open_recipe import open_network, open_splits
from jaxft.progress import show_progress_on
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.stage_plan import plan
from jaxft.stages import Stage
from jaxft.train.finetune import finetune
from jaxft.train.run_caches import RunCaches

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """One run of a comparison.

    Attributes:
      strategy: name of the strategy.
      seed: seed of the run.
      accuracy, loss: validation score; NaN if the run diverged.
      seconds: duration of the run; None if it was interrupted and resumed.
      trained: number of parameters that train in any of its stages.
    """

    strategy: str
    seed: int
    accuracy: float
    loss: float
    seconds: float | None
    trained: int


@dataclass(frozen=True)
class Rank:
    """A strategy's runs.

    Attributes:
      strategy: name of the strategy.
      outcomes: its runs, by seed.
      accuracy: mean accuracy.
      loss: mean loss.
      difference: mean difference in accuracy to the best strategy, over the same seeds.
      interval: 95 % confidence interval of the difference (Student's t over the seeds); None for
        the best strategy and for a single seed.
    """

    strategy: str
    outcomes: tuple[Outcome, ...]
    accuracy: float
    loss: float
    difference: float
    interval: tuple[float, float] | None


def ranked(outcomes: Sequence[Outcome]) -> tuple[Rank, ...]:
    """Returns the strategies from the best mean accuracy to the worst; ties by mean loss.

    Args:
      outcomes: one for each strategy and seed.
    """
    runs: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.strategy, {})[outcome.seed] = outcome

    def mean(strategy: str, field: str) -> float:
        return float(np.mean([getattr(run, field) for run in runs[strategy].values()]))

    def key(strategy: str) -> tuple[bool, float, float]:
        accuracy = mean(strategy, "accuracy")
        return math.isnan(accuracy), -accuracy, mean(strategy, "loss")  # NaN last

    order = sorted(runs, key=key)
    best = runs[order[0]]
    ranks = []
    for name in order:
        outcomes = tuple(runs[name][seed] for seed in sorted(runs[name]))
        differences = [each.accuracy - best[each.seed].accuracy for each in outcomes]
        interval = None if name == order[0] else _interval(differences)
        means = mean(name, "accuracy"), mean(name, "loss")
        ranks.append(Rank(name, outcomes, *means, float(np.mean(differences)), interval))
    return tuple(ranks)


def compare(
    recipe: Recipe,
    workdir: str | PathLike[str],
    *,
    strategies: Sequence[str] = (),
    seeds: int = 3,
    lr: float = LR,
    epochs: int = EPOCHS,
    data: Source | Splits | None = None,
    model: Model | None = None,
    console: Console | None = None,
) -> tuple[Rank, ...]:
    """Runs strategies over seeds on the same images, and ranks them by validation accuracy.

    All runs share the decoded images, and the features of frozen blocks where these have the same
    weights. A comparison that is interrupted continues when it is called again, also with more
    strategies or seeds. Writes `comparison.json` and `best.yaml`, the recipe of the best strategy.
    Each run's folder keeps its recipe and metrics; its checkpoints are deleted.

    The best of several strategies looks better on the images that chose it than on new ones: keep a
    test set apart, and evaluate on it once.

    Args:
      recipe: network, weights, images and settings; its stages are not used.
      workdir: folder of the comparison.
      strategies: names, see `jaxft.default_stages.default_stages`; by default all of the network's.
      seeds: number of seeds: `recipe.seed` and those after it.
      lr: learning rate of the body in all strategies.
      epochs: total length of the stages of each strategy; a linear probe does not count.
      data: images to use instead of the recipe's.
      model: network to use instead of the recipe's.
      console: where to print.

    Returns:
      The strategies, the best first.

    Raises:
      JaxftError: as `jaxft.finetune`; or the folder holds a comparison of another recipe or on
        other images.
    """
    if jax.process_count() > 1:
        raise RecipeError("a comparison runs in a single process; it has been started in several.")
    if seeds < 1:
        raise RecipeError(f"seeds is {seeds}; it must be at least 1.")
    console = console or Console()
    folder = atomic.anywhere(workdir)
    with show_progress_on(console.terminal):
        splits = open_splits(recipe, data)
    with closing(RunCaches.of_recipe(recipe, splits)) as caches:
        for remark in splits.remarks:
            console.say(remark)
        network = open_network(recipe, model, splits.train.classes)
        chosen = tuple(dict.fromkeys(strategies)) or names(network)
        stages = {name: default_stages(name, network, lr=lr, epochs=epochs) for name in chosen}
        fields = recipe_file.decisive(recipe)
        del fields["stages"]
        settings = {"recipe": fields, "lr": lr, "epochs": epochs}
        log = _Log(folder / "comparison.json", settings, record(splits))
        runs = [(name, recipe.seed + k) for k in range(seeds) for name in chosen]
        for name, seed in runs:
            place = folder / f"{name}-{seed}"
            if (name, seed) not in log:
                console.row(f"Running {name}, seed {seed} ...")
                run = dataclasses.replace(recipe, stages=stages[name], seed=seed)
                outcome = _run(name, run, place, caches, network, given=model)
                log.add(outcome)
                console.row(f"  accuracy {outcome.accuracy:.4f}, loss {outcome.loss:.4f}")
            _discard(place)
    ranks = ranked([each for each in log.outcomes if (each.strategy, each.seed) in runs])
    best = dataclasses.replace(recipe, stages=stages[ranks[0].strategy])
    recipe_file.save(best, folder / "best.yaml")
    return ranks


def _run(
    name: str, recipe: Recipe, folder: Path, caches: RunCaches, model: Model, given: Model | None
) -> Outcome:
    """Runs one strategy with one seed; the score of a run that diverges is NaN."""
    resumed, began = folder.exists(), time.perf_counter()
    accuracy = loss = math.nan
    with suppress(NonFiniteError):
        result = finetune(recipe, folder, model=given, caches=caches, console=Console(quiet=True))
        accuracy, loss = result.score.accuracy, result.score.loss
    seconds = None if resumed else time.perf_counter() - began
    return Outcome(name, recipe.seed, accuracy, loss, seconds, _num_trained(model, recipe.stages))


def _discard(folder: Path) -> None:
    """Deletes the checkpoints of a run that is in the log."""
    for name in ("checkpoints", "start"):
        epath.Path(folder / name).rmtree(missing_ok=True)


def _num_trained(model: Model, stages: Sequence[Stage]) -> int:
    """Returns the number of parameters that train in any of the stages."""
    params, _ = init_shapes(model)
    labels = [leaf_labels(params, each.labels) for each in plan(stages, params)]
    trained = [any(label != FROZEN for label in leaf) for leaf in zip(*labels, strict=True)]
    leaves = jax.tree.leaves(params)
    return sum(leaf.size for leaf, trains in zip(leaves, trained, strict=True) if trains)


def _interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of the mean; None for a single value."""
    count = len(differences)
    if count == 1:
        return None
    half = student_t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(differences, ddof=1)
    half /= np.sqrt(count)
    mean = np.mean(differences)
    return float(mean - half), float(mean + half)


class _Log:
    """Outcomes so far, stored with the settings and the images that they are for."""

    def __init__(self, path: Path, settings: dict[str, Any], data: dict[str, Any]) -> None:
        self.path, self.settings, self.data = path, settings, data
        self.outcomes = list[Outcome]()
        if not path.exists():
            return
        content = json.loads(path.read_text())
        if changed := _changed(content["settings"], settings):
            raise RecipeError(
                f"{path.parent} holds a comparison with other settings: {', '.join(changed)}. "
                "Choose another --workdir."
            )
        if changed := changes(content.get("data", data), data):
            raise DataError(
                f"{path.parent} holds a comparison on other images ('then'):"
                + "".join(f"\n  {line}" for line in changed)
                + "\nRestore them, or choose another --workdir."
            )
        self.outcomes = [Outcome(**fields) for fields in content["outcomes"]]

    def __contains__(self, run: tuple[str, int]) -> bool:
        return run in {(outcome.strategy, outcome.seed) for outcome in self.outcomes}

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        outcomes = [dataclasses.asdict(each) for each in self.outcomes]
        content = {"settings": self.settings, "data": self.data, "outcomes": outcomes}
        atomic.write(self.path, json.dumps(content, indent=2) + "\n")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the settings that differ, with both values."""
    old, new = ({**settings["recipe"], **settings} for settings in (before, now))
    return [
        f"{name} ({old.get(name)}, now {new[name]})"
        for name in new
        if name != "recipe" and old.get(name) != new[name]
    ]
