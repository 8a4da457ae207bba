"""Creating networks by name."""

import zlib

import pytest
from flax import nnx

from jaxft.data import Preprocessing
from jaxft.errors import RecipeError
from jaxft.models import NetworkConfig, create, names, register, registry
from jaxft.models.nnx_adapter import expected_preprocessing


@pytest.mark.parametrize("name", names())
def test_create_every_registered_name(name):
    model = create(name, num_classes=3)
    assert (model.name, model.num_classes) == (name, 3)
    assert (model.blocks[0], model.blocks[-1]) == ("stem", "head")
    assert len(model.blocks) == len(model.block_patterns) == len({*model.blocks})
    assert model.block_patterns[-1] == (model.head,)


ERRORS = {
    "misspelt name": ("resnet5O", {}, "'resnet5O'. Did you mean 'resnet50'"),
    "unknown name": ("vgg", {}, r"'vgg'\..*names\(\) lists all"),
    "no bottlenecks": (
        "resnet34",
        {"stride_in_1x1": True},
        "resnet34: it has no bottlenecks.*such as resnet50",
    ),
    "no classes": ("resnet18", {"num_classes": 0}, "resnet18: num_classes is 0.* at least 1"),
    "no such option": (
        "resnet18",
        {"patches": 3},
        r"resnet18 has no option patches; its options are binary, .*stride_in_1x1\.",
    ),
    "no such module": ("no_such:net", {}, "'no_such:net', and there is no module 'no_such'"),
    "not registered by the module": ("math:net", {}, "no model is called 'math:net'"),
    "patch size": (
        "vit_small_patch14_dinov2",
        {"image_size": 224 + 7},
        "vit_small_patch14_dinov2: image_size is 231, .* the patch size 14: use 224 or 238",
    ),
}


@pytest.mark.parametrize(("name", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_create_errors(name, options, message):
    with pytest.raises(RecipeError, match=message):
        create(name, **options)


FUNCTION = "def resnet18(num_classes): ..."
REGISTERED = """
from flax import nnx
from jaxft.models import NetworkConfig, register
class Mine(nnx.Module): ...
class Config(NetworkConfig):
    blocks = ("stem", "head")
register("my_net", Mine, Config())
"""


@pytest.mark.parametrize(
    ("content", "name", "registered"),
    [(FUNCTION, "resnet18", False), ("", "resnet18", False), (REGISTERED, "my_net", True)],
    ids=["a function goes first", "a network of jaxft", "its own network"],
)
def test_name_with_module_is_that_modules(content, name, registered, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", registry._NETWORKS.copy())
    monkeypatch.syspath_prepend(tmp_path)
    module = f"module_{zlib.crc32((content + name).encode())}"
    (tmp_path / f"{module}.py").write_text(content)
    assert registry.is_registered(f"{module}:{name}") is registered


SIZES = {
    "a CNN keeps what the weights state": ("resnet18", {}, Preprocessing(image_size=64), 64, 256),
    "a ViT has its own size": (
        "vit_tiny_patch16_224", {"image_size": 64},
        Preprocessing(image_size=32, resize_size=40), 64, 80,
    ),
    "nothing is stated": ("efficientnet_b3", {}, None, 288, 329),
    "nothing is stated, another size": ("vit_tiny_patch16_224", {"image_size": 64}, None, 64, 71),
}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "stated", "size", "resize"), SIZES.values(), ids=SIZES)
def test_expected_preprocessing_has_the_networks_size(name, options, stated, size, resize):
    preprocessing = expected_preprocessing(create(name, **options), stated)
    assert (preprocessing.image_size, preprocessing.resize_size) == (size, resize)


def test_head_layers_may_be_a_list():
    assert create("resnet18", head_layers=[8, "relu"]) == create(
        "resnet18", head_layers=(8, "relu")
    )


def test_image_size_is_ignored_by_networks_without_position_embeddings():
    assert create("resnet18", image_size=64) == create("resnet18")


class Network(nnx.Module):
    """A network of a user."""


class Config(NetworkConfig):
    """Its configuration."""

    blocks = ("stem", "head")


class OtherNetwork(nnx.Module):
    """Another one."""


def test_register_refuses_the_name_of_another_network(monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", {})
    register("mine", Network, Config())
    register("mine", Network, Config(dropout=0.1))  # as a reloaded module does
    with pytest.raises(RecipeError, match="called 'mine' exists already: choose another name"):
        register("mine", OtherNetwork, Config())
