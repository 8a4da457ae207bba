"""URLs and preprocessing of published weights agree with torchvision."""

import importlib.util
from pathlib import Path

import pytest

from jaxft.errors import WeightsError
from jaxft.weights import torchvision as torchvision_weights
from jaxft.weights.torchvision import published_weights


def record_golden():
    path = Path(__file__).parents[1] / "models" / "record_golden.py"
    spec = importlib.util.spec_from_file_location("record_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
@pytest.mark.filterwarnings("ignore")
def test_published_weights_agree_with_torchvision():
    resnet = record_golden().import_torchvision().models.resnet
    enums = {name: getattr(resnet, name) for name in dir(resnet) if name.endswith("_Weights")}
    assert enums.keys() == torchvision_weights._FILES.keys()
    for name, enum in enums.items():
        assert list(torchvision_weights._FILES[name]) == [member.name for member in enum]
        for member in [*enum.__members__, "DEFAULT"]:
            expected = getattr(enum, member)
            published = published_weights(f"{name}.{member}")
            assert published.url == expected.url
            assert f"-{published.sha256}.pth" in expected.url
            transforms = expected.transforms()
            preprocessing = published.preprocessing
            assert transforms.interpolation.value == preprocessing.interpolation
            assert transforms.crop_size == [preprocessing.image_size]
            assert transforms.resize_size == [preprocessing.resize_size]
            assert tuple(transforms.mean) == preprocessing.mean
            assert tuple(transforms.std) == preprocessing.std


V1, V2 = (f"torchvision:ResNet50_Weights.IMAGENET1K_V{i}" for i in (1, 2))
UNKNOWN = {
    "resnet50": f"Did you mean {V1} or {V2}?",
    "ResNet50_Weights": f"Did you mean {V1} or {V2}?",
    "ResNet50_Weights.IMAGENET1K_V3": f"Did you mean {V1} or {V2}?",
    "resnet50_weights.imagenet1k_v2": f"Did you mean {V1} or {V2}?",
    "ResNet50.IMAGENET1K_V2": f"Did you mean {V1} or {V2}?",
    "resnet8": "ResNet18_Weights.IMAGENET1K_V1",
    "": "no such weights. The known ones of torchvision are ResNet18_Weights, ",
    "AlexNet_Weights.DEFAULT": "Wide_ResNet101_2_Weights.",
}


@pytest.mark.parametrize(("name", "text"), UNKNOWN.items())
def test_published_weights_suggests_similar_names(name, text):
    with pytest.raises(WeightsError) as raised:
        published_weights(name)
    assert str(raised.value).startswith(f"torchvision:{name}: no such weights.")
    assert text in str(raised.value)
