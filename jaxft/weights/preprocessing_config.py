"""Reads the preprocessing and the network that weights expect from the files stored with them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from etils import epath

from jaxft.data.geometry import Interpolation
from jaxft.data.preprocessing import Preprocessing
from jaxft.weights.description import Description, parse
from jaxft.weights.hub import description_paths


def find_preprocessing(weights: Path) -> Preprocessing | None:
    """Returns the preprocessing in the first description that has one in a known format.

    Args:
      weights: Weights file, or a run's folder or one of its checkpoints.
    """
    for content in _read_descriptions(weights):
        for reader in (_from_model_json, _from_recipe, _from_timm, _from_transformers):
            try:
                return reader(content)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                continue  # another format
    return None


def find_description(weights: Path) -> Description:
    """Returns the description of the network; each field comes from the first file that has it.

    Args:
      weights: Weights file, or a run's folder or one of its checkpoints.
    """
    description = Description()
    for content in _read_descriptions(weights):
        description = description.with_defaults(parse(content))
    return description


def _read_descriptions(weights: Path) -> Iterator[Any]:
    """Yields the content of each readable JSON or YAML file that describes the weights."""
    paths = description_paths(weights)
    if weights.is_dir():
        folders = (weights, weights.parent)  # RUN, RUN/checkpoints or RUN/checkpoints/STEP
        run = next((each.parent for each in folders if each.name == "checkpoints"), weights)
        # A run writes recipe.yaml when it starts and model.json when it ends.
        paths = (run / "recipe.yaml", *description_paths(run / "model.safetensors"))
    for path in paths:
        load = yaml.safe_load if path.suffix == ".yaml" else json.loads
        with suppress(OSError, ValueError, yaml.YAMLError):
            yield load(epath.Path(path).read_text())


def _from_model_json(content: Any) -> Preprocessing:
    """Parses `model.json`, which a run writes."""
    fields = content["preprocessing"]
    mean, std = _channels(fields["mean"]), _channels(fields["std"])
    return Preprocessing(**{**fields, "mean": mean, "std": std})


def _from_recipe(content: Any) -> Preprocessing:
    """Parses `recipe.yaml`, in which a run resolves all preprocessing fields."""
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    fields = content["stages"] and {name: content[name] for name in names if name in content}
    return _from_model_json({"preprocessing": fields})


def _from_timm(content: Any) -> Preprocessing:
    """Parses timm's `config.json` as its `resolve_data_config` and `transforms_imagenet_eval`."""
    config = content.get("pretrained_cfg", content)
    channels, *sides = config["input_size"]
    if channels != 3:
        raise ValueError(channels)
    default = Preprocessing()
    return Preprocessing.timm(
        min(sides),
        config.get("crop_pct") or 0.875,
        resize_mode="squash" if config.get("crop_mode") == "squash" else "short_side",
        interpolation=_interpolation(config.get("interpolation") or "bicubic"),
        mean=_channels(config.get("mean") or default.mean),
        std=_channels(config.get("std") or default.std),
    )


def _from_transformers(content: Any) -> Preprocessing:
    """Parses `preprocessor_config.json` of transformers' ConvNext and similar image processors.

    Its ResNets use the ConvNext processor.
    """
    size = resize_size = _side(content["size"])
    mode: Literal["short_side", "squash"] = "short_side"
    kind = str(content.get("image_processor_type") or content.get("feature_extractor_type"))
    if content.get("crop_size") and content.get("do_center_crop", True):
        size = _side(content["crop_size"])
    elif kind.startswith("ConvNext") and size < 384:
        resize_size = int(size / (content.get("crop_pct") or 0.875))
    elif kind.startswith("ConvNext") or "height" in str(content["size"]):  # resized without a crop
        mode = "squash"
    is_normalised = content.get("do_normalize", True)
    return Preprocessing(
        image_size=size,
        resize_size=resize_size,
        resize_mode=mode,
        interpolation=_interpolation(content.get("resample", 2)),
        mean=_channels(content["image_mean"]) if is_normalised else (0.0, 0.0, 0.0),
        std=_channels(content["image_std"]) if is_normalised else (1.0, 1.0, 1.0),
    )


def _side(size: Any) -> int:
    """Returns the shorter side of a size in transformers' format."""
    if isinstance(size, Mapping):
        size = (
            size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
        )
    return int(size)


def _interpolation(name: str | int) -> Interpolation:
    """Returns the nearest supported interpolation for timm's name or Pillow's number."""
    return "bicubic" if name in ("bicubic", "lanczos", "random", 1, 3) else "bilinear"


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
