"""Exports a run: weights with torch's names, their description, and a compiled program."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxft import model_card, weights
from jaxft.checkpoint import atomic
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.errors import CheckpointError, WeightsError
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.models.lora_model import LoraModel, split_adapters
from jaxft.recipe import Recipe
from jaxft.train.metrics import Score
from jaxft.train.state import Progress
from jaxft.train.workdir import saved
from jaxft.weights import jax_export, onnx_export
from jaxft.weights.description import fields
from jaxft.weights.head import subtree
from jaxft.weights.jax_export import PLATFORMS
from jaxft.weights.lora_file import CONFIG, TENSORS, save_lora

FORMATS = {"jax": "model.jaxexport", "onnx": "model.onnx"}
"""Formats of the evaluation program, and their files."""


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
    programs: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `model.safetensors` (torch's names) and `model.json`; returns the former.

    Adapters are merged in it. They are also written as PEFT's, to `adapter/`, with the head if it
    has torch's names, unless a stage has merged them before.

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
      programs: descriptions of the programs that are written too: `program`, of
        `model.jaxexport`; `onnx`, of `model.onnx`.
    """
    if isinstance(model, LoraModel):
        _write_adapters(folder / "adapter", recipe, model, params)
        params, model = model.merge(params), model.network
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
    description |= programs or {}
    atomic.write(folder / "model.json", json.dumps(description, indent=2) + "\n")
    return path


def _write_adapters(folder: Path, recipe: Recipe, model: LoraModel, params: Tree) -> None:
    """Writes the adapters in PEFT's files; deletes the files if a stage has merged the adapters."""
    if any(stage.merge_lora for stage in recipe.stages):
        for name in (CONFIG, TENSORS):
            (folder / name).unlink(missing_ok=True)
        return
    adapters = split_adapters(params)[1]
    head = {model.head: subtree(params, model.head.split("."))} if model.key_map else None
    save_lora(folder, adapters, alpha=model.alpha, trained=head)


def export(
    workdir: Path,
    folder: Path | None = None,
    *,
    model: Model | None = None,
    formats: tuple[str, ...] = ("jax",),
    platforms: tuple[str, ...] = PLATFORMS,
    license_id: str | None = None,
) -> tuple[Path, Score]:
    """Exports the newest checkpoint of a run, whether the run has ended or not.

    Writes `model.safetensors` and `model.json`, as a run does at its end, a model card
    (`README.md`), and the evaluation as a program in each of `formats`.

    Args:
      workdir: folder of the run.
      folder: where to write; by default the workdir.
      model: the network, if `finetune` received one.
      formats: `jax` writes `model.jaxexport`, see `jaxft.weights.jax_export`; `onnx` writes
        `model.onnx`, see `jaxft.weights.onnx_export`.
      platforms: platforms of `model.jaxexport`.
      license_id: license in the model card, see `model_card.write`.

    Returns:
      The path of the weights and their validation score: the best of the stage so far.

    Raises:
      CheckpointError: the workdir holds no run with a whole checkpoint.
      RecipeError, WeightsError: the run was given its network, and `model` is missing.
      ModelError: the network cannot be exported in a format.
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
    programs, files = dict[str, Any](), dict[str, bytes]()
    arguments = params, stats, recipe.preprocessing
    if "jax" in formats:
        files[FORMATS["jax"]] = jax_export.serialize(
            network, *arguments, pixels=pixels, platforms=platforms
        )
        programs["program"] = jax_export.lifetime()
    if "onnx" in formats:
        float32 = network
        if model is None and network.options.get("dtype", "float32") != "float32":
            float32 = dataclasses.replace(recipe, dtype="float32").network(len(classes))
        files[FORMATS["onnx"]], programs["onnx"] = onnx_export.serialize(
            float32, *arguments, pixels=pixels
        )
    folder = folder or workdir
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        atomic.write(folder / name, content)
    facts: Any = {
        "classes": classes,
        "score": score,
        "pixels": pixels,
        "multi_label": header.data.get("multi_label", False),
        "programs": programs,
    }
    path = write(folder, recipe, network, params, stats, **facts)
    description = json.loads(path.with_name("model.json").read_text())
    model_card.write(folder, recipe, network, description, license_id)
    return path, score
