"""What a run starts from: parameters and statistics of its network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import WeightsError, first_of
from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.models import Model
from jaxft.recipe import Recipe
from jaxft.stage_plan import StagePlan
from jaxft.weights import Weights
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head import with_head
from jaxft.weights.load import load_fitted

Start = tuple[Tree, Tree]
"""Parameters and statistics; shapes alone where a run need not start from them."""

_SHOWN = 8  # arrays that do not fit


def shapes(model: Model) -> Start:
    """For a run that has begun, or starts elsewhere."""
    return jax.eval_shape(model.init, jax.random.key(0))


def drawn(
    recipe: Recipe, model: Model, source: Weights | None, classes: Sequence[str] | None = None
) -> Start:
    """Pretrained weights with the head that the recipe asks for, or all of it random.

    `source` is fitted to the network (see `jaxft.weights.load.fitted`). `classes` are those of the
    images, in the order of the logits; None: whatever they are.
    """
    key = jax.random.key(recipe.seed)
    if source:
        return load_fitted(source, model, recipe.head, key, classes)
    params, stats = model.init(key)
    if recipe.head in ("zeros", "xavier"):
        params = with_head(model, params, recipe.head, key)
    return params, stats


def given(recipe: Recipe, model: Model, start: Start) -> tuple[Start, list[str]]:
    """Fits the caller's arrays to the network.

    Floating-point arrays are cast to the network's dtypes. A head that is missing, or of another
    size, is replaced by a new one, as `recipe.head` says; with `zeros` or `xavier` any head is.

    Returns the start in the network's containers, and a remark for each change.
    Raises WeightsError where arrays do not fit, are not floating point, are not finite, or are
    running variances below 0.
    """
    if not (isinstance(start, tuple | list) and len(start) == 2):
        raise WeightsError(
            f"start must be (params, stats), as {model.name}'s init returns; it is a "
            f"{type(start).__name__}."
        )
    expected = shapes(model)
    wanted = dict(zip(paths(expected), jax.tree.leaves(expected), strict=True))
    found = dict(zip(paths(tuple(start)), map(_array, jax.tree.leaves(start)), strict=True))
    wrong = _mismatches(wanted, found)
    in_head = tuple(f"{tree}.{model.head}." for tree in (0, 1))
    only_head = all(
        path.startswith(in_head) and (path not in found or _is_floating(found[path]))
        for path in wrong
    )
    if wrong and (recipe.head == "keep" or not only_head):
        lines = [f"{path}: {mismatch}" for path, mismatch in wrong.items()]
        raise WeightsError(
            "\n  ".join(
                [f"start does not fit {model.name} (0 is params, 1 is stats):"]
                + first_of(lines, _SHOWN)
                + ['Only the head differs: head="fresh" draws a new one.'] * only_head
            )
        )
    remarks = []
    if wrong or recipe.head in ("zeros", "xavier"):
        new = drawn(recipe, model, None)
        heads = dict(zip(wanted, jax.tree.leaves(new), strict=True))
        found = {path: (heads if path.startswith(in_head) else found)[path] for path in wanted}
        why = f"does not fit {model.num_classes} classes" if wrong else "is replaced"
        remarks.append(
            f"The head of start, {model.head}, {why}: a new one is drawn (head={recipe.head!r})."
        )
    cast = Counter(
        f"{x.dtype} to {wanted[path].dtype}"
        for path, x in found.items()
        if x.dtype != wanted[path].dtype
    )
    remarks += [f"{count} arrays of start are cast from {how}." for how, count in cast.items()]
    # By path, for a FrozenDict or NNX state may have another order.
    leaves = [jnp.asarray(found[path], like.dtype) for path, like in wanted.items()]
    fitted: Start = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    check_finite("start (0 is params, 1 is stats)", wanted, fitted)
    return fitted, remarks


def frozen_at_random(plans: Sequence[StagePlan], params: Tree) -> list[str]:
    """Returns a remark on the first stage that freezes parameters which no stage has trained yet.

    `params` are random; only their paths are read.
    """
    trained: set[str] = set()
    for plan in plans:
        labels = dict(zip(paths(params), leaf_labels(params, plan.labels), strict=True))
        trained |= {path for path, label in labels.items() if label != FROZEN}
        if untrained := [path for path in labels if path not in trained]:
            parts = ", ".join(dict.fromkeys(path.partition(".")[0] for path in untrained))
            return [
                f"Stage {plan.stage.name!r} freezes random weights: {parts}. Nothing pretrained "
                "was given; name it by weights=... or start=..., or train these layers first."
            ]
    return []


def _array(leaf: Any) -> jax.Array | np.ndarray:
    """The leaf as an array; an array of objects where it is none."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    try:
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError):  # such as a torch tensor on a GPU
        return np.asarray(None)


def _is_floating(array: jax.Array | np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _mismatches(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each array that does not fit, by its path."""
    wrong = {path: f"missing {list(wanted[path].shape)}" for path in wanted if path not in found}
    for path, own in found.items():
        like = wanted.get(path)
        if like is None:
            wrong[path] = f"{list(own.shape)} is not in the network"
        elif not _is_floating(own):
            wrong[path] = f"{own.dtype}, not floating point"
        elif own.shape != like.shape:
            wrong[path] = f"{list(own.shape)}, not {list(like.shape)}"
    return wrong
