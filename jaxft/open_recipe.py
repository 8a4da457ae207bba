"""Opens the images, the network and the weights that a recipe names."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import data, models, weights
from jaxft.data import Cached, Source, Splits
from jaxft.data.arrays import ArraySource
from jaxft.data.augment import VIEWS
from jaxft.data.process_source import ProcessSource, in_processes
from jaxft.data.source import is_multi_label
from jaxft.divided_check import check_in_parts
from jaxft.errors import DataError, ModelError, RecipeError, WeightsError, first_of
from jaxft.labels import Tree, paths
from jaxft.models import Model, user_factory
from jaxft.models.lora_model import LoraModel, with_lora, without_lora
from jaxft.models.nnx_adapter import expected_preprocessing, init_shapes
from jaxft.multi_label_check import check_multi_label
from jaxft.recipe import Recipe
from jaxft.weights import Weights
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head import with_head
from jaxft.weights.load import fitted, load_fitted

Start = tuple[Tree, Tree]
"""Parameters and statistics; only their shapes where a run starts from a checkpoint."""

_SHOWN = 8  # arrays that do not fit


def check_network(recipe: Recipe, given: Model | None) -> None:
    """Checks the network as far as possible without building it.

    Raises:
      JaxftError: the network does not exist, or does not go with the recipe.
    """
    if given is not None:
        user_factory.checked(given, "model is")
        _check_own(recipe, given)
    elif user_factory.names_factory(recipe.model):
        user_factory.find(recipe.model)
        recipe.check_own_network()
    else:
        recipe.network(num_classes=2)  # its name and options


def _check_own(recipe: Recipe, model: Model) -> None:
    """Raises RecipeError where the recipe does not go with a user's network."""
    recipe.check_own_network()
    if recipe.statistics != "global" and isinstance(model, models.Linen | models.NNX):
        raise RecipeError(
            f"statistics={recipe.statistics!r} needs norm layers of jaxft's: Flax's, as in "
            f"{model.name}, take the statistics of the whole batch. Leave it at 'global'."
        )
    if recipe.remat and len(model.blocks) < 3:
        raise RecipeError(
            f"remat computes a network again block by block, and {model.name} has no blocks before "
            "its head, or only one: it would cost a forward pass and save no memory. Name more, "
            "models.Linen(..., blocks=...), or leave it out; within the module flax.linen.remat "
            "and flax.nnx.remat do the same for its layers."
        )


def check_augment(recipe: Recipe) -> None:
    """Checks that `augment_on_device` has an effect on a stage.

    Raises:
      RecipeError: it has none.
    """
    augments = dict.fromkeys(recipe.settings(stage).augment for stage in recipe.stages)
    if recipe.augment_on_device and not any(VIEWS[name].runs_on_device for name in augments):
        moving = ", ".join(name for name, view in VIEWS.items() if view.runs_on_device)
        raise RecipeError(
            f"augment_on_device has nothing to do: augment={' and '.join(augments)} leaves no step "
            f"to the device. Use one of {moving}, or leave augment_on_device out."
        )


def check_image_size(recipe: Recipe, model: Model) -> None:
    """Checks that the network takes images of the recipe's size.

    Raises:
      ModelError: it does not.
    """
    side, model = recipe.preprocessing.image_size, without_lora(model)
    if isinstance(model, models.Linen | models.NNX) and model.shape != (side, side, 3):
        raise ModelError(
            f"{model.name} takes images of shape {model.shape}, and the recipe's are "
            f"{(side, side, 3)}: set the recipe's image_size to the network's, or build the "
            "network with the recipe's shape."
        )
    size = getattr(model, "image_size", None)
    if size not in (None, side):
        raise ModelError(
            f"{model.name} was built for images of {size} pixels, and the recipe's have {side}: "
            "set the recipe's image_size, or build the network for it."
        )


def open_splits(recipe: Recipe, given: Source | Splits | None) -> Splits:
    """Opens the given images or the recipe's, with a cache for decoded ones.

    Raises:
      DataError: something is wrong with them, or all training images are of one class.
      RecipeError: images have several labels, and the recipe needs one class per image.
    """
    train = given.train if isinstance(given, Splits) else given
    if train is not None and is_multi_label(train):
        check_multi_label(recipe, train)
    splits = data.open_source(
        recipe.data if given is None else given,
        split_by=recipe.split_by,
        train=recipe.train_split,
        val=recipe.val_split,
        shots=recipe.shots,
        seed=recipe.seed,
        on_bad_image=recipe.on_bad_image,
        sample_above={"all": None, "sample": 0, None: recipe.cache_mib * 2**20}[recipe.check],
        divide=check_in_parts,
    )
    present = np.unique(splits.train.targets)
    if len(present) == 1 and not is_multi_label(splits.train):
        raise DataError(
            f"{recipe.data}: all images to train on are of one class, "
            f"'{splits.train.classes[present[0]]}', so that any answer would be right. Add images "
            "of what is to be told from it, as a class such as 'other'."
        )
    count = sum(map(len, splits))

    def cached(source: Source) -> Source:
        if isinstance(source, ArraySource):  # is in memory
            return source
        return Cached(source, recipe.cache_mib * 2**20 * len(source) // count)

    train, val = map(cached, splits)
    if recipe.worker_processes:
        train, val = in_processes([train, val], recipe.worker_processes)
    return Splits(train, val, (*splits.remarks, *_dropped(recipe, len(splits.train))))


def close_splits(splits: Splits) -> None:
    """Ends the worker processes of the splits, if there are any."""
    if isinstance(splits.train, ProcessSource):
        splits.train.workers.close()


def _dropped(recipe: Recipe, images: int) -> list[str]:
    """Returns a remark on the images that `drop_last` leaves out, for each batch size."""
    if not recipe.drop_last or recipe.balance == "sampling":
        return []
    sizes = dict.fromkeys(recipe.settings(stage).batch_size for stage in recipe.stages)
    return [
        f"drop_last leaves out {images % size} of {images:,} images in each epoch, other ones each "
        f"time: they do not fill a batch of {size}."
        for size in sizes
        if images % size
    ]


def read_weights(
    recipe: Recipe, model: Model, classes: Sequence[str]
) -> tuple[Weights | None, Recipe]:
    """Reads the recipe's weights; returns them and the recipe with the preprocessing they expect.

    Raises:
      WeightsError: they do not fit the network, or the recipe keeps a head of other classes.
    """
    model = without_lora(model)
    if recipe.weights is None:
        return None, recipe.expecting(expected_preprocessing(model, None))
    source = weights.read(recipe.weights, own_names=not model.key_map)
    source = fitted(source, model, recipe.head, wanted_classes(recipe, classes))
    return source, recipe.expecting(expected_preprocessing(model, source.preprocessing))


def wanted_classes(recipe: Recipe, classes: Sequence[str]) -> Sequence[str] | None:
    """Returns the classes that a pretrained head must have; None if it may have any."""
    return classes if recipe.head_classes == "match" else None


def open_network(recipe: Recipe, given: Model | None, classes: tuple[str, ...]) -> Model:
    """Returns the given network, or else the recipe's, with the adapters of `recipe.lora`.

    Raises:
      RecipeError: it has another number of classes, or cannot have these adapters.
    """
    model = given or recipe.network(len(classes))
    if given is None and user_factory.names_factory(recipe.model):
        _check_own(recipe, model)
    if model.num_classes != len(classes):
        raise RecipeError(
            f"{model.name} has {model.num_classes} classes, and the images have {len(classes)}: "
            f"{', '.join(classes)}."
        )
    return with_lora(model, recipe.lora, recipe.lora_alpha)


def draw_start(
    recipe: Recipe, model: Model, source: Weights | None, classes: Sequence[str] | None = None
) -> Start:
    """Returns pretrained weights with the head that the recipe asks for, or random weights.

    Args:
      recipe: the run's recipe.
      model: the network.
      source: pretrained weights that are fitted to the network, see `jaxft.weights.load.fitted`;
        None: random ones.
      classes: classes of the images in the order of the logits; None: any.
    """
    key = jax.random.key(recipe.seed)
    if isinstance(model, LoraModel):
        params, stats = draw_start(recipe, model.network, source, classes)
        return model.with_adapters(params, key), stats
    if source:
        return load_fitted(source, model, recipe.head, key, classes)
    params, stats = model.init(key)
    if recipe.head in ("zeros", "xavier"):
        params = with_head(model, params, recipe.head, key)
    return params, stats


def fit_start(recipe: Recipe, model: Model, start: Start) -> tuple[Start, list[str]]:
    """Fits the caller's arrays to the network; see `start` of `jaxft.finetune`.

    Adapters of `recipe.lora` are new.

    Returns:
      The start in the network's containers, and a remark for each change.

    Raises:
      WeightsError: arrays do not fit, are not floating point, are not finite, or are running
        variances below 0.
    """
    if isinstance(model, LoraModel):
        (params, stats), remarks = fit_start(recipe, model.network, start)
        return (model.with_adapters(params, jax.random.key(recipe.seed)), stats), remarks
    if not (isinstance(start, tuple | list) and len(start) == 2):
        raise WeightsError(
            f"start must be (params, stats), as {model.name}'s init returns; it is a "
            f"{type(start).__name__}."
        )
    expected = init_shapes(model)
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
        new = draw_start(recipe, model, None)
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


def _array(leaf: Any) -> jax.Array | np.ndarray:
    """Returns the leaf as an array; an array of objects if it is not numeric."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    try:
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError):  # such as a torch tensor on a GPU
        return np.asarray(None)


def _is_floating(array: jax.Array | np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _mismatches(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """Returns why an array does not fit, by path."""
    wrong = {path: f"missing {list(wanted[path].shape)}" for path in wanted if path not in found}
    for path, array in found.items():
        like = wanted.get(path)
        if like is None:
            wrong[path] = f"{list(array.shape)} is not in the network"
        elif not _is_floating(array):
            wrong[path] = f"{array.dtype}, not floating point"
        elif array.shape != like.shape:
            wrong[path] = f"{list(array.shape)}, not {list(like.shape)}"
    return wrong
