"""Which heads can be solved: that of a network with blocks, all of it, and linear."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError, RecipeError
from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.models import Model
from jaxft.stage_plan import StagePlan


def check_solvable(
    plan: StagePlan, model: Model, params: Tree, stats: Tree, *, image_size: int
) -> None:
    """Raises ModelError or RecipeError unless the stage trains the head, and that is linear.

    `params` and `stats` need only be shapes.
    """
    name, head = plan.stage.name, model.head
    if len(model.blocks) < 2:
        raise ModelError(
            f"stage {name!r} solves the head on the features before it, and {model.name} is one "
            "block, of which they cannot be had. Step its head instead, with a learning rate; or "
            "use jaxft.logistic_regression on features of your own."
        )
    labels = leaf_labels(params, plan.labels)
    shapes = {
        path: leaf.shape
        for path, leaf, label in zip(paths(params), jax.tree.leaves(params), labels, strict=True)
        if label != FROZEN or f"{path}.".startswith(f"{head}.")
    }
    trained = [path for path, label in zip(paths(params), labels, strict=True) if label != FROZEN]
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    features, _ = jax.eval_shape(
        partial(model.apply, norms="running", last=model.blocks[-2]), params, stats, images
    )
    kernel, bias = (*features.shape[1:], model.num_classes), (model.num_classes,)
    if features.ndim != 2 or shapes != {f"{head}.kernel": kernel, f"{head}.bias": bias}:
        raise RecipeError(
            f"stage {name!r}: a LogisticRegression solves the head alone, and that must be one "
            f"linear layer: {head}.kernel [d {model.num_classes}] and {head}.bias on features "
            f"[b d]. In {model.name} features are {['b', *features.shape[1:]]}, and head and "
            f"pattern have {', '.join(f'{path} {list(x)}' for path, x in shapes.items())}."
        )
    if sorted(trained) != sorted(shapes):
        raise RecipeError(
            f"stage {name!r}: a LogisticRegression solves all of the head, and the pattern "
            f"selects only {', '.join(trained)}. Write {head!r}."
        )
