"""What pretrained weights expect of images, as a file beside them says."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from etils import epath

from jaxft.data.geometry import Interpolation
from jaxft.data.preprocessing import Preprocessing
from jaxft.weights.description import Description, parse
from jaxft.weights.hub import descriptions


def expected(weights: Path) -> Preprocessing | None:
    """What a file beside the weights says, if it says it as we, timm or transformers do."""
    for said in _beside(weights):
        for reader in (_ours, _recipes, _timms, _transformers):
            try:
                return reader(said)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                continue  # not of this kind
    return None


def described(weights: Path) -> Description:
    """Returns what the files beside the weights say of their network, each part by the first."""
    found = Description()
    for said in _beside(weights):
        found = found.completed(parse(said))
    return found


def _beside(weights: Path) -> Iterator[Any]:
    """The content of the files that describe the weights."""
    files = descriptions(weights)
    if weights.is_dir():
        run = weights.parents[1] if weights.parent.name == "checkpoints" else weights
        # The recipe is there from the first, model.json at the end.
        files = (run / "recipe.yaml", *descriptions(run / "model.safetensors"))
    for file in files:
        read = yaml.safe_load if file.suffix == ".yaml" else json.loads
        with suppress(OSError, ValueError, yaml.YAMLError):
            yield read(epath.Path(file).read_text())


def _ours(said: Any) -> Preprocessing:
    """`model.json`, as a run writes it."""
    fields = said["preprocessing"]
    return Preprocessing(**{**fields, "mean": _three(fields["mean"]), "std": _three(fields["std"])})


def _recipes(said: Any) -> Preprocessing:
    """`recipe.yaml`, whose fields are settled when a run begins."""
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    settled = said["stages"] and {name: said[name] for name in names if name in said}
    return _ours({"preprocessing": settled})


def _timms(said: Any) -> Preprocessing:
    """`config.json`, as timm's `resolve_data_config` and `transforms_imagenet_eval` read it."""
    config = said.get("pretrained_cfg", said)
    channels, *sides = config["input_size"]
    if channels != 3:
        raise ValueError(channels)
    default = Preprocessing()
    return Preprocessing(
        image_size=min(sides),
        resize_mode="squash" if config.get("crop_mode") == "squash" else "short_side",
        resize_size=math.floor(min(sides) / (config.get("crop_pct") or 0.875)),
        interpolation=_interpolation(config.get("interpolation") or "bicubic"),
        mean=_three(config.get("mean") or default.mean),
        std=_three(config.get("std") or default.std),
    )


def _transformers(said: Any) -> Preprocessing:
    """`preprocessor_config.json`, for its ConvNext processor (also ResNet's) and those alike."""
    size = resize_size = _edge(said["size"])
    mode: Literal["short_side", "squash"] = "short_side"
    kind = str(said.get("image_processor_type") or said.get("feature_extractor_type"))
    if said.get("crop_size") and said.get("do_center_crop", True):
        size = _edge(said["crop_size"])
    elif kind.startswith("ConvNext") and size < 384:
        resize_size = int(size / (said.get("crop_pct") or 0.875))
    elif kind.startswith("ConvNext") or "height" in str(said["size"]):  # both sides, and no crop
        mode = "squash"
    normalised = said.get("do_normalize", True)
    return Preprocessing(
        image_size=size,
        resize_size=resize_size,
        resize_mode=mode,
        interpolation=_interpolation(said.get("resample", 2)),
        mean=_three(said["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=_three(said["image_std"]) if normalised else (1.0, 1.0, 1.0),
    )


def _edge(size: Any) -> int:
    if isinstance(size, Mapping):
        size = (
            size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
        )
    return int(size)


def _interpolation(said: str | int) -> Interpolation:
    """By timm's name or Pillow's number, smooth as bilinear is or sharp as bicubic is."""
    return "bicubic" if said in ("bicubic", "lanczos", "random", 1, 3) else "bilinear"


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
