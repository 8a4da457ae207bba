"""What a run starts from: parameters and statistics of its network."""

import jax
import jax.numpy as jnp

from jaxft.errors import WeightsError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.recipe import Recipe
from jaxft.weights import Weights, load
from jaxft.weights.head import with_head

Start = tuple[Tree, Tree]
"""Parameters and statistics; shapes alone where a run need not start from them."""


def shapes(model: Model) -> Start:
    """For a run that has begun, or starts elsewhere."""
    return jax.eval_shape(model.init, jax.random.key(0))


def drawn(recipe: Recipe, model: Model, source: Weights | None) -> Start:
    """Pretrained weights with the head that the recipe asks for, or all of it random."""
    key = jax.random.key(recipe.seed)
    if source:
        return load(source, model, head=recipe.head, key=key)
    params, stats = model.init(key)
    if recipe.head in ("zeros", "xavier"):
        params = with_head(model, params, recipe.head, key)
    return params, stats


def given(model: Model, start: Start) -> Start:
    """A caller's own, in the containers of the model.

    Raises WeightsError if they do not fit it.
    """
    expected = shapes(model)
    found = dict(zip(paths(start), jax.tree.leaves(start), strict=True))
    ours = {path: jnp.shape(leaf) for path, leaf in found.items()}
    wanted = {p: x.shape for p, x in zip(paths(expected), jax.tree.leaves(expected), strict=True)}
    if wrong := sorted({path for path, _ in wanted.items() ^ ours.items()}):
        raise WeightsError(
            f"start does not fit {model.name}; missing, extra or of another shape (params are 0., "
            f"stats 1.): {', '.join(wrong)}"
        )
    # By path, for a FrozenDict or NNX state may have another order.
    return jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(found[p]) for p in wanted])
