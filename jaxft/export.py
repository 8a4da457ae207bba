"""Exports a run: weights with torch's names, their description, and a compiled program."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxft import weights
from jaxft.checkpoint import atomic
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.errors import CheckpointError, WeightsError
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.recipe import Recipe
from jaxft.train.metrics import Score
from jaxft.train.state import Progress
from jaxft.train.workdir import saved
from jaxft.weights.description import fields
from jaxft.weights.jax_export import PLATFORMS, lifetime, serialize


def write(
    folder: Path,
    recipe: Recipe,
    model: Model,
    params: Tree,
    stats: Tree,
    *,
    classes: Sequence[str],
    score: Score,
    pixels: str = "uint8",
    multi_label: bool = False,
    program: Mapping[str, str] | None = None,
) -> Path:
    """Writes `model.safetensors` (torch's names) and `model.json`; returns the former.

    Args:
      folder: where to write.
      recipe: the run's recipe.
      model: the network.
      params, stats: its weights.
      classes: names of the classes, in the order of the logits.
      score: validation score of the weights.
      pixels: `float32` if images are normalised already, so that `mean` and `std` do not apply.
      multi_label: whether an image may have several labels: a sigmoid of each logit is the
        probability of its class.
      program: description of `model.jaxexport`, if that is written too; see `lifetime`.
    """
    path = folder / "model.safetensors"
    weights.save(path, model, params, stats, classes=classes)
    description = {
        **fields(model, classes),
        "model": recipe.model,
        "pixels": pixels,
        "preprocessing": dataclasses.asdict(recipe.preprocessing),
        "score": score.values,
        "tta": recipe.tta,
        "matmul_precision": recipe.matmul_precision,
    }
    if multi_label:
        description["multi_label"] = True
    if program:
        description["program"] = dict(program)
    atomic.write(folder / "model.json", json.dumps(description, indent=2) + "\n")
    return path


def export(
    workdir: Path,
    folder: Path | None = None,
    *,
    model: Model | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> tuple[Path, Score]:
    """Exports the newest checkpoint of a run, whether the run has ended or not.

    Writes `model.safetensors` and `model.json`, as a run does at its end, and `model.jaxexport`;
    see `jaxft.weights.jax_export.serialize`.

    Args:
      workdir: folder of the run.
      folder: where to write; by default the workdir.
      model: the network, if `finetune` received one.
      platforms: platforms of the compiled program.

    Returns:
      The path of the weights and their validation score: the best of the stage so far.

    Raises:
      CheckpointError: the workdir holds no run with a whole checkpoint.
      RecipeError, WeightsError: the run was given its network, and `model` is missing.
    """
    recipe, checkpoints = saved(workdir), workdir / "checkpoints"
    if recipe is None:
        raise CheckpointError(f"{workdir} holds no run with a checkpoint; name a run's --workdir.")
    with closing(Checkpoints(checkpoints)) as kept:
        step = kept.latest_step()
        assert step is not None
        header = Header.from_json(kept.header(step))
    progress = Progress.from_fields(header.progress)
    classes, pixels = header.data["classes"], header.data.get("pixels", "uint8")
    score = (
        progress.restored_score(recipe.stages[progress.stage]) if progress.ended else progress.best
    )
    network = model or recipe.network(len(classes))
    try:
        params, stats = weights.load(kept.path(step), network)
    except WeightsError as error:
        raise WeightsError(
            f"{error}\nA run that was given its network, finetune(model=...), is exported with it: "
            "jaxft.export.export(workdir, model=...)."
        ) from error
    folder = folder or workdir
    folder.mkdir(parents=True, exist_ok=True)
    expected = recipe.preprocessing
    program = serialize(network, params, stats, expected, pixels=pixels, platforms=platforms)
    atomic.write(folder / "model.jaxexport", program)
    facts: Any = {
        "classes": classes,
        "score": score,
        "pixels": pixels,
        "multi_label": header.data.get("multi_label", False),
        "program": lifetime(),
    }
    return write(folder, recipe, network, params, stats, **facts), score
