"""Checks that a linear probe can replace a network's head: it must be one linear layer."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError, RecipeError, first_of
from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.models import Model
from jaxft.stage_plan import StagePlan

_MAX_PATHS = 8  # in a message


def check_linear_head(
    plan: StagePlan, model: Model, shapes: tuple[Tree, Tree], image_size: int
) -> None:
    """Checks that a linear probe trains the whole head alone, and that it is one linear layer.

    Args:
      plan: a linear-probe stage, applied to the network's parameters.
      model: the network.
      shapes: parameters and statistics, or their shapes.
      image_size: side of the images in pixels.

    Raises:
      ModelError: the network is one block, so that no features before the head are known.
      RecipeError: the stage trains more or less than the head, or the head is not linear.
    """
    params, stats = shapes
    head, num_classes = model.head, model.num_classes
    if len(model.blocks) < 2:
        raise ModelError(
            f"a LinearProbe needs the features before the head, but {model.name} is a single "
            "block: it has no parameters before its head, or cannot be cut there. Give the head a "
            "learning rate instead, or pass features of your own to jaxft.logistic_regression."
        )
    labels = leaf_labels(params, plan.labels)
    trained = [path for path, label in zip(paths(params), labels, strict=True) if label != FROZEN]
    leaves = zip(paths(params), jax.tree.leaves(params), strict=True)
    layers = {path: leaf.shape for path, leaf in leaves if f"{path}.".startswith(f"{head}.")}
    if sorted(trained) != sorted(layers):
        raise RecipeError(
            f"a LinearProbe trains the whole head and nothing else, but its "
            f"pattern selects {', '.join(first_of(trained, _MAX_PATHS))}. Write "
            f"train={{{head!r}: LinearProbe()}}."
        )
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    features, _ = jax.eval_shape(
        partial(model.apply, norms="running", last=model.blocks[-2]), params, stats, image
    )
    inputs = features.shape[1:]
    kernel, bias = f"{head}.kernel", f"{head}.bias"
    if len(inputs) != 1 or layers != {kernel: (*inputs, num_classes), bias: (num_classes,)}:
        raise RecipeError(
            f"a LinearProbe needs a head that is one linear layer: {kernel} "
            f"[d {num_classes}] and {bias} [{num_classes}] on features [b d]. {model.name} has "
            f"features {_brackets('b', *inputs)} and the head "
            + ", ".join(f"{path} {_brackets(*shape)}" for path, shape in layers.items())
            + ". Give the head a learning rate instead."
        )


def _brackets(*axes: object) -> str:
    return f"[{' '.join(map(str, axes))}]"
