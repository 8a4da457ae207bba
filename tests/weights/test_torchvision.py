"""The table is torchvision's own."""

import importlib.util
from pathlib import Path

import pytest

from jaxft.errors import WeightsError
from jaxft.weights import torchvision as ours
from jaxft.weights.torchvision import published


def record_golden():
    path = Path(__file__).parents[1] / "models" / "record_golden.py"
    spec = importlib.util.spec_from_file_location("record_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_the_live_enums():
    resnet = record_golden().import_torchvision().models.resnet
    enums = {name: getattr(resnet, name) for name in dir(resnet) if name.endswith("_Weights")}
    assert enums.keys() == ours._TABLE.keys()
    for name, enum in enums.items():
        assert list(ours._TABLE[name]) == [member.name for member in enum]
        for member in [*enum.__members__, "DEFAULT"]:
            live, found = getattr(enum, member), published(f"{name}.{member}")
            assert found.url == live.url
            assert f"-{found.sha256}.pth" in live.url
            theirs = live.transforms()
            assert theirs.interpolation.value == found.preprocessing.interpolation
            assert theirs.crop_size == [found.preprocessing.image_size]
            assert theirs.resize_size == [found.preprocessing.resize_size]
            assert tuple(theirs.mean) == found.preprocessing.mean
            assert tuple(theirs.std) == found.preprocessing.std


V1, V2 = (f"torchvision:ResNet50_Weights.IMAGENET1K_V{i}" for i in (1, 2))
UNKNOWN = {
    "resnet50": f"Did you mean {V1} or {V2}?",
    "ResNet50_Weights": f"Did you mean {V1} or {V2}?",
    "ResNet50_Weights.IMAGENET1K_V3": f"Did you mean {V1} or {V2}?",
    "resnet50_weights.imagenet1k_v2": f"Did you mean {V1} or {V2}?",
    "ResNet50.IMAGENET1K_V2": f"Did you mean {V1} or {V2}?",
    "resnet8": "ResNet18_Weights.IMAGENET1K_V1",
    "": "no such weights. Those of torchvision known here: ResNet18_Weights, ",
    "AlexNet_Weights.DEFAULT": "Wide_ResNet101_2_Weights.",
}


@pytest.mark.parametrize(("name", "said"), UNKNOWN.items())
def test_near_misses(name, said):
    with pytest.raises(WeightsError) as raised:
        published(name)
    assert str(raised.value).startswith(f"torchvision:{name}: no such weights.")
    assert said in str(raised.value)
