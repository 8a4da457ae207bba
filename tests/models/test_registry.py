"""Creating networks by name."""

import pytest
from flax import nnx

from jaxft.errors import RecipeError
from jaxft.models import NetworkConfig, create, names, register, registry


@pytest.mark.parametrize("name", names())
def test_create_every_registered_name(name):
    model = create(name, num_classes=3)
    layers = 3 if name.startswith("cifar") else 4
    assert model.blocks == ("stem", *(f"layer{i + 1}" for i in range(layers)), "head")
    assert (model.name, model.head, model.num_classes) == (name, "fc", 3)


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
}


@pytest.mark.parametrize(("name", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_create_errors(name, options, message):
    with pytest.raises(RecipeError, match=message):
        create(name, **options)


def test_image_size_is_ignored_by_networks_without_position_embeddings():
    assert create("resnet18", image_size=64) == create("resnet18")


class Network(nnx.Module):
    """A network of a user."""


class OtherNetwork(nnx.Module):
    """Another one."""


def test_register_refuses_the_name_of_another_network(monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", {})
    register("mine", Network, NetworkConfig())
    register("mine", Network, NetworkConfig(dropout=0.1))  # as a reloaded module does
    with pytest.raises(RecipeError, match="called 'mine' exists already: choose another name"):
        register("mine", OtherNetwork, NetworkConfig())
