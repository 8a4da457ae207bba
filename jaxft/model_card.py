"""Writes the model card of an export: `README.md` with the metadata that the hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.checkpoint import atomic
from jaxft.models.model import Model
from jaxft.recipe import Recipe
from jaxft.weights.hub import parse_reference

NAME = "README.md"
REPOSITORY = "hf:OWNER/NAME"
"""Placeholder for the name of the repository, which `push` fills in."""

_MARK = "<!-- Written by jaxft export. Delete this line to keep your edits. -->"
_SHOWN_CLASSES = 100
_PUBLIC_DATA = ("digits", "tfds")


def write(
    folder: Path,
    recipe: Recipe,
    model: Model,
    description: Mapping[str, Any],
    license_id: str | None = None,
) -> None:
    """Writes `README.md`, unless the folder has one without the line that marks ours.

    Args:
      folder: folder of the export.
      recipe: the run's recipe.
      model: the network.
      description: content of `model.json`.
      license_id: license as the hub names it, such as `apache-2.0`; by default the one of the
        present card, or `unknown`.
    """
    path = folder / NAME
    card = path.read_text() if path.exists() else _MARK
    if _MARK in card:
        present = re.search(r"^license: (\S+)$", card, re.MULTILINE)
        license_id = license_id or (present[1] if present else "unknown")
        atomic.write(path, model_card(recipe, model, description, license_id))


def model_card(
    recipe: Recipe, model: Model, description: Mapping[str, Any], license_id: str
) -> str:
    """Returns the model card; see `write`."""
    sections = [
        f"---\n{_metadata(recipe, description, license_id)}\n---\n{_MARK}",
        f"# {recipe.model}, fine-tuned on {_data_name(recipe)}",
        f"{_origin(recipe)} Fine-tuned with jaxft in {len(recipe.stages)} "
        f"stage{'s' * (len(recipe.stages) > 1)}: {', '.join(each.name for each in recipe.stages)}.",
        "## Validation score\n\n" + _table(description["score"]),
        f"## Classes\n\n{_classes(description)}",
        f"## Images\n\n{_preprocessing(description)}",
        f"## Use\n\n{_code(_jaxft_lines())}",
    ]
    if lines := _torch_lines(model):
        sections.append(f"In PyTorch, with images normalised as above:\n\n{_code(lines)}")
    if onnx := description.get("onnx"):
        sections.append(
            f"`model.onnx` (opset {onnx['opset']}) maps `images`, {onnx['images']}, to `logits`, "
            f"{onnx['logits']}.{_normalizes(description)}"
        )
    if program := description.get("program"):
        sections.append(
            f"`model.jaxexport` runs with jax alone: `jax.export.deserialize(content)"
            f".call(images)`. jax {program['jax']} wrote it on {program['written']}, and newer "
            f"versions are guaranteed to run it until {program['good_until']}."
        )
    return "\n\n".join(sections) + "\n"


def _metadata(recipe: Recipe, description: Mapping[str, Any], license_id: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_name=_data_name(recipe),
            dataset_split="validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in description["score"].items()
    ]
    scheme, _, reference = (recipe.weights or "").partition("#")[0].partition(":")
    data = ModelCardData(
        model_name=f"{recipe.model} on {_data_name(recipe)}",
        eval_results=results,
        library_name="jaxft",
        license=license_id,
        pipeline_tag="image-classification",
        tags=["image-classification", "jax", "jaxft"],
        metrics=["accuracy"],
        base_model=parse_reference(reference).repo if scheme == "hf" else None,
    )
    return data.to_yaml().strip()


def _data_name(recipe: Recipe) -> str:
    """Returns the name of the images, without the path on this machine."""
    scheme, _, place = recipe.data.partition(":")
    return recipe.data if scheme in _PUBLIC_DATA else Path(place).name or scheme


def _origin(recipe: Recipe) -> str:
    weights = recipe.weights
    if weights is None:
        return f"A {recipe.model} that started from random weights."
    is_public = weights.startswith(("hf:", "torchvision:", "https:", "asset:"))
    start = f"`{weights}`" if is_public else "pretrained weights"
    return f"A {recipe.model} that started from {start}."


def _table(score: Mapping[str, float]) -> str:
    rows = (f"| {name} | {value:.4f} |" for name, value in score.items())
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _classes(description: Mapping[str, Any]) -> str:
    names = description["classes"]
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_CLASSES])
    more = f" and {len(names) - _SHOWN_CLASSES} more, in `model.json`"
    kind = "An image may have several labels; the" if description.get("multi_label") else "The"
    end = more if len(names) > _SHOWN_CLASSES else ""
    return f"{kind} {len(names)} classes, in the order of the logits: {shown}{end}."


def _preprocessing(description: Mapping[str, Any]) -> str:
    fields = description["preprocessing"]
    size, resize = fields["image_size"], fields["resize_size"]
    if description["pixels"] == "float32":
        return f"Normalised float32 values, {size} pixels high and wide."
    scaled = "The images must have this size: "
    if resize and fields["resize_mode"] == "squash":
        scaled = f"Scale both sides to {resize} pixels ({fields['interpolation']}), crop the centre"
        scaled += " to "
    elif resize:
        scaled = f"Scale the shorter side to {resize} pixels ({fields['interpolation']}), crop the "
        scaled += "centre to "
    mean, std = (", ".join(f"{value:g}" for value in fields[name]) for name in ("mean", "std"))
    return (
        f"{scaled}{size} pixels. Divide the values by 255, subtract the mean ({mean}) and divide "
        f"by the standard deviation ({std}) of red, green and blue. jaxft does all of this."
    )


def _normalizes(description: Mapping[str, Any]) -> str:
    if not description["onnx"]["normalizes"]:
        return ""
    return " It normalises the images; scale and crop them beforehand."


def _jaxft_lines() -> list[str]:
    return [
        "import jaxft",
        "",
        f'classifier = jaxft.Classifier.load("{REPOSITORY}")  # or the folder of these files',
        'print(classifier.predict("photos").labels)',
    ]


def _torch_lines(model: Model) -> list[str] | None:
    """Returns the lines that load the weights in torch; None without a torchvision or timm name."""
    changed = ("stride_in_1x1", "concat_pool", "head_layers", "binary")
    library = getattr(model, "torch_library", None)
    if not library or any(model.options.get(name) for name in changed):
        return None
    builder, arguments = "timm.create_model", f'"{model.name}", num_classes={model.num_classes}'
    if library == "torchvision":
        builder, arguments = f"torchvision.models.{model.name}", f"num_classes={model.num_classes}"
    return [
        f"import {builder.partition('.')[0]}",
        "from safetensors.torch import load_file",
        "",
        f"net = {builder}({arguments}).eval()",
        'net.load_state_dict(load_file("model.safetensors"))',
    ]


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
