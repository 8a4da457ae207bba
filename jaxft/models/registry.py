"""The networks by name."""

import difflib
from dataclasses import replace

from jaxft.errors import RecipeError
from jaxft.models.model import Model
from jaxft.models.nnx_model import NNXModel
from jaxft.models.resnet import ResNet, ResNetConfig

_CONFIGS = {
    "resnet18": ResNetConfig("imagenet", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("imagenet", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("imagenet", (3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNetConfig("imagenet", (3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig("imagenet", (3, 8, 36, 3), bottleneck=True),
    # Depth 6n + 2: two convolutions in each of 3n blocks, the stem and the head.
    **{f"cifar_resnet{6 * n + 2}": ResNetConfig("cifar", (n, n, n)) for n in (1, 3, 5, 7, 9)},
}


def names() -> tuple[str, ...]:
    """The names `create` knows."""
    return tuple(_CONFIGS)


def create(name: str, *, num_classes: int = 1000, stride_in_1x1: bool = False) -> Model:
    """The network called `name`, without any arrays yet.

    `stride_in_1x1` is for weights of the original ResNet-50, 101 and 152 (He et al., Caffe,
    Keras), whose bottlenecks stride on their first 1x1 convolution; torchvision's do not.
    Raises RecipeError for an unknown name, or options that do not fit the network.

        model = create("resnet18", num_classes=2)
        params, stats = model.init(jax.random.key(0))
        logits, stats = model.apply(params, stats, images, norms="running")
    """
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise RecipeError(f"no model is called {name!r}.{hint}\n  Models: {', '.join(_CONFIGS)}")
    if num_classes < 1:
        raise RecipeError(f"{name}: num_classes is {num_classes}; it must be at least 1")
    config = _CONFIGS[name]
    if stride_in_1x1 and not config.bottleneck:
        raise RecipeError(
            f"{name} has no bottlenecks, so stride_in_1x1 means nothing to it; "
            f"it is for {', '.join(n for n, c in _CONFIGS.items() if c.bottleneck)}"
        )
    config = replace(config, num_classes=num_classes, stride_in_1x1=stride_in_1x1)
    return NNXModel(name, ResNet, config)
