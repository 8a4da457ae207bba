"""Creating networks by name."""

import pytest

from jaxft.errors import RecipeError
from jaxft.models import create, names


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
    "no classes": ("resnet18", {"num_classes": 0}, "at least 1"),
}


@pytest.mark.parametrize(("name", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_create_errors(name, options, message):
    with pytest.raises(RecipeError, match=message):
        create(name, **options)
