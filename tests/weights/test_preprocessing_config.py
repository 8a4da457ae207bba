"""Preprocessing in the files next to weights: of jaxft, timm and transformers."""

import json
from pathlib import Path

import pytest

from jaxft.data.preprocessing import Preprocessing
from jaxft.weights.locate import Located, locate

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


JAXFT = Preprocessing(image_size=32, resize_size=None, interpolation="bicubic", **HALVES)
MODEL_JSON = {"model": "resnet18", "preprocessing": {
    "image_size": 32, "resize_size": None, "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}}  # fmt: skip
RECIPE = {"model": "resnet18", "stages": [{"name": "head"}], **MODEL_JSON["preprocessing"]}
OLDER_JSON = {"preprocessing": {"image_size": 64, "resize_size": 72, **IMAGENET}}


@pytest.mark.parametrize(
    ("weights", "file", "content", "expected"),
    [
        ("model.safetensors", "model.json", MODEL_JSON, JAXFT),
        ("best.pt", "best.json", MODEL_JSON, JAXFT),
        ("best.pt", "model.json", MODEL_JSON, None),
        ("w.pth", "w.json", OLDER_JSON, Preprocessing(image_size=64, resize_size=72)),
        ("w.pth", "w.json", {"preprocessing": {"image_size": 64}}, None),
        ("w.pth", "w.json", {"preprocessing": {**MODEL_JSON["preprocessing"], "tint": 1}}, None),
        ("w.pth", "w.json", {"preprocessing": "none"}, None),
        ("w.pth", "w.json", [1, 2], None),
        ("w.pth", "w.json", "not JSON", None),
        ("run", "run/model.json", MODEL_JSON, JAXFT),
        ("run/checkpoints/120", "run/model.json", MODEL_JSON, JAXFT),
        ("run/elsewhere/120", "run/model.json", MODEL_JSON, None),
        ("run", "run/recipe.yaml", RECIPE, JAXFT),
        ("run/checkpoints/120", "run/recipe.yaml", RECIPE, JAXFT),
        ("run", "run/recipe.yaml", "stages: []", None),
        ("run", "run/recipe.yaml", "{", None),
    ],
)
def test_find_preprocessing_of_a_run(weights, file, content, expected):
    path = Path(weights)
    if path.suffix:
        path.touch()
    else:
        path.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    Path(file).write_text(text)
    assert locate(weights) == Located(path, expected)


TIMM = {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic", **IMAGENET}
CONVNEXT = {
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "size": 224,
}  # fmt: skip
VIT = CONVNEXT | {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2}
# JSON, and the expected image size, resize size, interpolation and resize mode.
TIMM_CONFIGS = {
    "usual": (TIMM, (224, 235, "bicubic")),
    "bilinear": (TIMM | {"interpolation": "bilinear"}, (224, 235, "bilinear")),
    "no crop": (TIMM | {"crop_pct": 1.0}, (224, 224, "bicubic")),
    "defaults": ({"input_size": [3, 224, 224]}, (224, 256, "bicubic")),
    "for tests": (TIMM | {"test_input_size": [3, 288, 288]}, (224, 235, "bicubic")),
    "lanczos": (TIMM | {"interpolation": "lanczos"}, (224, 235, "bicubic")),
    "nearest": (TIMM | {"interpolation": "nearest"}, (224, 235, "bilinear")),
    "not square": (TIMM | {"input_size": [3, 256, 320]}, (256, 269, "bicubic")),
    "squashed": (TIMM | {"crop_mode": "squash"}, (224, 235, "bicubic", "squash")),
    "grey": (TIMM | {"input_size": [1, 224, 224]}, None),
}
TRANSFORMERS_CONFIGS = {
    "resnet": (CONVNEXT, (224, 256, "bicubic")),
    "its crop": (CONVNEXT | {"crop_pct": 0.95}, (224, 235, "bicubic")),
    "shortest edge": (CONVNEXT | {"size": {"shortest_edge": 224}}, (224, 256, "bicubic")),
    "large": (CONVNEXT | {"size": {"shortest_edge": 384}}, (384, 384, "bicubic", "squash")),
    "processor": (
        {"image_processor_type": "ConvNextImageProcessorFast", **CONVNEXT},
        (224, 256, "bicubic"),
    ),
    "bilinear": (CONVNEXT | {"resample": 2}, (224, 256, "bilinear")),
    "vit": (VIT, (224, 224, "bilinear")),
    "sides": (VIT | {"size": {"height": 240, "width": 240}}, (240, 240, "bilinear", "squash")),
    "crop": (
        VIT | {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
        (224, 256, "bilinear"),
    ),
    "crop not done": (VIT | {"crop_size": 200, "do_center_crop": False}, (224, 224, "bilinear")),
    "no mean": ({"size": 224}, None),
    "other size": (VIT | {"size": {"longest_edge": 224}}, None),
}


def read_back(config, name: str) -> Preprocessing | None:
    Path("model.safetensors").touch()
    Path(name).write_text(json.dumps(config))
    return locate("model.safetensors").preprocessing


def preprocessing(expected, **normalisation) -> Preprocessing | None:
    if expected is None:
        return None
    names = ("image_size", "resize_size", "interpolation", "resize_mode")
    return Preprocessing(**dict(zip(names, expected, strict=False)), **normalisation)


@pytest.mark.parametrize(("config", "expected"), TIMM_CONFIGS.values(), ids=TIMM_CONFIGS)
def test_find_preprocessing_of_timm(config, expected):
    assert read_back({"pretrained_cfg": config}, "config.json") == preprocessing(expected)
    assert read_back({"architecture": "resnet50", **config}, "config.json") == preprocessing(
        expected
    )


@pytest.mark.parametrize(
    ("config", "expected"), TRANSFORMERS_CONFIGS.values(), ids=TRANSFORMERS_CONFIGS
)
def test_find_preprocessing_of_transformers(config, expected):
    Path("config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    assert read_back(config, "preprocessor_config.json") == preprocessing(expected, **HALVES)


def test_find_preprocessing_of_transformers_without_normalisation():
    result = read_back(CONVNEXT | {"do_normalize": False}, "preprocessor_config.json")
    assert (result.mean, result.std) == ((0, 0, 0), (1, 1, 1))
