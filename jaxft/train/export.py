"""What a run hands back: its weights for torch, what one must know to use them, and a program."""

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
    program: Mapping[str, str] | None = None,
) -> Path:
    """Writes `model.safetensors` (torch's names) and `model.json`; returns the former.

    pixels: `float32` if the images were normalised already, so that `mean` and `std` do not apply.
    program: of `model.jaxexport`, where it is written too; see `lifetime`.
    """
    path = folder / "model.safetensors"
    weights.save(path, model, params, stats, classes=classes)
    description = {
        **fields(model, classes),
        "model": recipe.model,
        "pixels": pixels,
        "preprocessing": dataclasses.asdict(recipe.preprocessing),
        "score": dataclasses.asdict(score),
    }
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
    """Writes what a run's newest checkpoint has to hand back, whether the run has ended or not.

    That is `model.safetensors` and `model.json`, as a run itself writes them at its end, and
    `model.jaxexport`, see `weights.export.serialize`; into `folder`, or else into the workdir.
    `model` is that which the run was given, if it was given one.
    Returns the weights' path and their validation score: the best of the stage so far.

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
        header = Header.from_json(kept.progress(step))
    progress = Progress.from_fields(header.progress)
    classes, pixels = header.data["classes"], header.data.get("pixels", "uint8")
    score = progress.handed_on(recipe.stages[progress.stage]) if progress.ended else progress.best
    network = model or recipe.network(len(classes))
    try:
        params, stats = weights.load(kept.path(step), network)
    except WeightsError as error:
        raise WeightsError(
            f"{error}\nA run that was given its network, finetune(model=...), is exported with it: "
            "jaxft.train.export.export(workdir, model=...)."
        ) from error
    folder = folder or workdir
    folder.mkdir(parents=True, exist_ok=True)
    expected = recipe.preprocessing
    program = serialize(network, params, stats, expected, pixels=pixels, platforms=platforms)
    atomic.write(folder / "model.jaxexport", program)
    facts: Any = {"classes": classes, "score": score, "pixels": pixels, "program": lifetime()}
    return write(folder, recipe, network, params, stats, **facts), score
