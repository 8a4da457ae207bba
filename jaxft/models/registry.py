"""The registry of networks: `register` adds one, `create` builds one by name.

The files in `jaxft/models/networks` register jaxft's networks. A network in your own module is
called `MODULE:NAME` and is found by importing the module.
"""

import difflib
import importlib
import pkgutil
from dataclasses import fields, replace
from functools import cache
from typing import Any

from flax import nnx

from jaxft import user_function
from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import RecipeError
from jaxft.models import networks
from jaxft.models.key_map import KeyMap
from jaxft.models.model import Model
from jaxft.models.network_config import NetworkConfig
from jaxft.models.nnx_adapter import Library, NNXModel

_NETWORKS: dict[str, NNXModel] = {}


def register(
    name: str,
    module: type[nnx.Module],
    config: NetworkConfig,
    *,
    key_map: KeyMap | None = None,
    preprocessing: Preprocessing | None = None,
    torch_library: Library = None,
) -> None:
    """Adds a network to the registry.

    Args:
      name: name of the network.
      module: class that builds the network as `module(config, rngs=rngs)`; see `NNXModel`.
      config: its configuration with 1,000 classes.
      key_map: names in weights files that differ from the network's.
      preprocessing: default preprocessing of the images, for weights that do not state theirs;
        None: torchvision's.
      torch_library: library whose network of this name accepts the weights, for model cards.

    Raises:
      RecipeError: if another network has this name.
    """
    if not _is_ours(module):
        _import_networks()  # so that the names of jaxft's networks are known
    registered = _NETWORKS.get(name)
    # A reloaded module registers its networks again.
    if registered is not None and _origin(registered.module) != _origin(module):
        raise RecipeError(f"a network called {name!r} exists already: choose another name.")
    _NETWORKS[name] = NNXModel(
        name, module, config, key_map or KeyMap(), preprocessing, torch_library
    )


def names() -> tuple[str, ...]:
    """Returns the names that `create` accepts."""
    _import_networks()
    return tuple(_NETWORKS)


def is_registered(name: str) -> bool:
    """Returns whether `create` accepts a name, after importing the module of `MODULE:NAME`.

    A function of that name in the module goes before a registered network.

    Raises:
      RecipeError: if there is no such module, or importing it fails.
    """
    _import_networks()
    module, _, short = name.rpartition(":")
    if not module:
        return short in _NETWORKS
    imported = user_function.import_module(module, name)
    is_registered = short in _NETWORKS and not _is_ours(_NETWORKS[short].module)
    return is_registered and not hasattr(imported, short)


def create(name: str, *, num_classes: int = 1000, **options: Any) -> Model:
    """Creates the network called `name`; its arrays come from `Model.init` or a weights file.

    Args:
      name: one of `names()`, or `MODULE:NAME` for a network that a module registers.
      num_classes: number of classes.
      **options: fields of the network's configuration. All networks have these:

        - `head_layers`: layers before the last linear layer: widths of linear layers and "relu",
          such as `(256, "relu", 32)`.
        - `binary`: predict two classes with one logit z. The last layer has one output and `apply`
          returns the logits (0, z); their cross entropy is torch's `BCEWithLogitsLoss` of z.
        - `dropout`: dropout rate of the features before the head. With `concat_pool`, the rate
          before the last linear layer; the rate before the first is half of it.
        - `drop_path`: stochastic depth rate of the last residual block, drawn for each example. The
          rate grows linearly with depth.
        - `dtype`: compute dtype; None uses the dtype of the images. Parameters, statistics and
          logits are float32. With "float64", which needs `jax_enable_x64`, they are float64.
        - `image_size`: side of the images. Only networks with position embeddings depend on it.

        ResNets also have `stride_in_1x1`, which puts the stride of bottlenecks on their first 1x1
        convolution, as weights of the original ResNet-50, 101 and 152 need it (He et al., Caffe,
        Keras; torchvision's do not), and `concat_pool`, fastai's head: the maximum and mean of each
        channel and two linear layers.

    Raises:
      RecipeError: if the name is unknown or an option does not fit the network.

    Example:
        model = create("resnet18", num_classes=2)
        params, stats = model.init(jax.random.key(0))
        logits, stats = model.apply(params, stats, images, norms="running")
    """
    if not is_registered(name):
        similar = difflib.get_close_matches(name, _NETWORKS, n=4)
        hint = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        raise RecipeError(
            f"no model is called {name!r}.{hint} jaxft.models.names() lists all {len(_NETWORKS)}.\n"
            "To train, resume or export your own network, pass it as model=... in Python, or name "
            "a function that builds it in the recipe: model='my_module:build'."
        )
    model = _NETWORKS[name.rpartition(":")[2]]
    known = {field.name for field in fields(model.config)}
    if unknown := sorted(options.keys() - known - {"image_size"}):
        raise RecipeError(
            f"{name} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(sorted({*model.options, 'num_classes'}))}."
        )
    if options.get("image_size") is None or "image_size" not in known:
        options.pop("image_size", None)
    try:
        config = replace(model.config, num_classes=num_classes, **options)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    return replace(model, name=name, config=config)


def _is_ours(module: type[nnx.Module]) -> bool:
    return module.__module__.startswith(f"{networks.__name__}.")


def _origin(module: type[nnx.Module]) -> tuple[str, str]:
    return module.__module__, module.__qualname__


@cache
def _import_networks() -> None:
    for module in pkgutil.iter_modules(networks.__path__, f"{networks.__name__}."):
        importlib.import_module(module.name)
