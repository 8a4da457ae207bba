"""Creates networks by name: torchvision's and timm's names, and the CIFAR networks of He et al."""

import difflib
from dataclasses import replace
from typing import Literal, get_args

import jax

from jaxft.errors import RecipeError
from jaxft.models.model import Model
from jaxft.models.nnx_adapter import NNXModel
from jaxft.models.resnet import ResNet, ResNetConfig


def _basic(*depths: int) -> ResNetConfig:
    return ResNetConfig("imagenet", depths)


def _bottleneck(*depths: int, groups: int = 1, base_width: int = 64) -> ResNetConfig:
    return ResNetConfig("imagenet", depths, bottleneck=True, groups=groups, base_width=base_width)


Dtype = Literal["float32", "bfloat16", "float64"]
"""Compute dtype of a network."""

_PLAIN = {
    "resnet10": _basic(1, 1, 1, 1),
    "resnet14": _bottleneck(1, 1, 1, 1),
    "resnet18": _basic(2, 2, 2, 2),
    "resnet26": _bottleneck(2, 2, 2, 2),
    "resnet34": _basic(3, 4, 6, 3),
    "resnet50": _bottleneck(3, 4, 6, 3),
    "resnet101": _bottleneck(3, 4, 23, 3),
    "resnet152": _bottleneck(3, 8, 36, 3),
    "resnet200": _bottleneck(3, 24, 36, 3),
    "resnext50_32x4d": _bottleneck(3, 4, 6, 3, groups=32, base_width=4),
    "resnext101_32x4d": _bottleneck(3, 4, 23, 3, groups=32, base_width=4),
    "resnext101_32x8d": _bottleneck(3, 4, 23, 3, groups=32, base_width=8),
    "resnext101_64x4d": _bottleneck(3, 4, 23, 3, groups=64, base_width=4),
    "wide_resnet50_2": _bottleneck(3, 4, 6, 3, base_width=128),
    "wide_resnet101_2": _bottleneck(3, 4, 23, 3, base_width=128),
}
# timm's letters: (widths of the stem, whether shortcuts average).
_VARIANTS = {
    "c": ((32, 32), False),
    "d": ((32, 32), True),
    "s": ((64, 64), False),
    "t": ((24, 32), True),
}
_DEPTHS = {
    "c": (50, 101, 152),
    "d": (18, 26, 34, 50, 101, 152, 200),
    "s": (50, 101, 152),
    "t": (10, 14, 26, 50),
}


def _variant(config: ResNetConfig, letter: str) -> ResNetConfig:
    stem, average = _VARIANTS[letter]
    return replace(config, stem=stem, average_shortcut=average)


_CONFIGS = {
    **{name: c for name, c in _PLAIN.items() if name not in ("resnet10", "resnet14")},
    **{
        f"resnet{depth}{letter}": _variant(_PLAIN[f"resnet{depth}"], letter)
        for letter, depths in _DEPTHS.items()
        for depth in depths
    },
    "resnext50d_32x4d": _variant(_PLAIN["resnext50_32x4d"], "d"),
    # Depth 6n + 2: two convolutions in each of 3n blocks, the stem and the head.
    **{f"cifar_resnet{6 * n + 2}": ResNetConfig("cifar", (n, n, n)) for n in (1, 3, 5, 7, 9, 18)},
}


def names() -> tuple[str, ...]:
    """Returns the names that `create` accepts."""
    return tuple(_CONFIGS)


def create(
    name: str,
    *,
    num_classes: int = 1000,
    stride_in_1x1: bool = False,
    concat_pool: bool = False,
    head_layers: tuple[int | Literal["relu"], ...] = (),
    binary: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    dtype: Dtype | None = None,
) -> Model:
    """Creates the network called `name`; its arrays come from `Model.init` or a weights file.

    Args:
      name: one of `names()`.
      num_classes: number of classes.
      stride_in_1x1: put the stride of bottlenecks on their first 1x1 convolution, as weights of the
        original ResNet-50, 101 and 152 need it (He et al., Caffe, Keras); torchvision's do not.
      concat_pool: use fastai's head, the maximum and mean of each channel and two linear layers.
      head_layers: layers before the last linear layer: widths of linear layers and "relu", such as
        `(256, "relu", 32)`.
      binary: predict two classes with one logit z. The last layer has one output and `apply`
        returns the logits (0, z); their cross entropy is torch's `BCEWithLogitsLoss` of z.
      dropout: dropout rate of the features before the head. With `concat_pool`, the rate before the
        last linear layer; the rate before the first is half of it.
      drop_path: stochastic depth rate of the last residual block, drawn for each example. The rate
        grows linearly with depth.
      dtype: compute dtype; None uses the dtype of the images. Parameters, statistics and logits are
        float32. With "float64", which needs `jax_enable_x64`, they are float64.

    Raises:
      RecipeError: if the name is unknown or an option does not fit the network.

    Example:
        model = create("resnet18", num_classes=2)
        params, stats = model.init(jax.random.key(0))
        logits, stats = model.apply(params, stats, images, norms="running")
    """
    if name not in _CONFIGS:
        similar = difflib.get_close_matches(name, _CONFIGS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        raise RecipeError(
            f"no model is called {name!r}.{hint}\n  Models: {', '.join(_CONFIGS)}\n"
            "To train, resume or export your own network, pass it as model=... in Python, or name "
            "a function that builds it in the recipe: model='my_module:build'."
        )
    if num_classes < 1:
        raise RecipeError(f"{name}: num_classes is {num_classes}; it must be at least 1")
    for option, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= rate < 1:
            raise RecipeError(f"{name}: {option} is {rate}; it must be at least 0 and below 1")
    if invalid := [x for x in head_layers if x != "relu" and not (isinstance(x, int) and x >= 1)]:
        raise RecipeError(
            f"{name}: head_layers has {invalid[0]!r}; each must be a width of at least 1 or 'relu'"
        )
    if head_layers and concat_pool:
        raise RecipeError(
            f"{name}: concat_pool and head_layers define two different heads; leave one out"
        )
    if binary and num_classes != 2:
        raise RecipeError(f"{name}: binary needs two classes, not {num_classes}; leave it out")
    if dtype not in (None, *get_args(Dtype)):
        choices = ", ".join(get_args(Dtype))
        raise RecipeError(f"{name}: dtype is {dtype!r}; it must be one of {choices}, or None")
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(float) != "float64":
        raise RecipeError(
            "dtype is 'float64', but JAX computes in float32. Turn float64 on: set the environment "
            "variable JAX_ENABLE_X64=1, or call jax.config.update('jax_enable_x64', True) before "
            "any array is created."
        )
    config = _CONFIGS[name]
    if stride_in_1x1 and not config.bottleneck:
        raise RecipeError(
            f"{name} has no bottlenecks, so stride_in_1x1 does not apply to it; use it with a "
            "network that has bottlenecks, such as resnet50"
        )
    config = replace(
        config,
        num_classes=num_classes,
        stride_in_1x1=stride_in_1x1,
        concat_pool=concat_pool,
        head_layers=head_layers,
        binary=binary,
        dropout=dropout,
        drop_path=drop_path,
        dtype=dtype,
    )
    return NNXModel(name, ResNet, config)
