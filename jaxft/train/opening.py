"""What a run opens before its first step: images, weights, network, a program for each stage."""

import warnings
from collections.abc import Sequence

import numpy as np

from jaxft import data, models, weights
from jaxft.data import Cached, Preprocessing, Source, Splits
from jaxft.data.arrays import Arrays
from jaxft.distributed import Devices
from jaxft.errors import DataError, ModelError, RecipeError
from jaxft.models import Model, user_factory
from jaxft.recipe import Recipe
from jaxft.stage_plan import plan
from jaxft.train.keeping import keeping
from jaxft.train.stage_program import Program, program
from jaxft.train.start import Start
from jaxft.weights import Weights
from jaxft.weights.load import fitted


def check_network(recipe: Recipe, given: Model | None) -> None:
    """Raises JaxftError for what can be known of a network before anything takes time."""
    if given is not None:
        user_factory.checked(given, "model is")
        _check_own(recipe, given)
    elif user_factory.names_factory(recipe.model):
        user_factory.find(recipe.model)
        recipe.check_own_network()
    else:
        recipe.network(num_classes=2)  # its name and options


def _check_own(recipe: Recipe, model: Model) -> None:
    """Raises RecipeError where the recipe does not go with a network of the user's own."""
    recipe.check_own_network()
    if recipe.statistics == "replica" and isinstance(model, models.Linen | models.NNX):
        raise RecipeError(
            f"statistics='replica' needs norm layers of jaxft's: Flax's, as in {model.name}, "
            "take the statistics of the whole batch. Leave it at 'global'."
        )
    if recipe.remat and len(model.blocks) == 1:
        raise RecipeError(
            f"remat computes a network again block by block, and {model.name} is one block: it "
            "would cost a forward pass and save no memory. Leave it out; within the module "
            "flax.linen.remat and flax.nnx.remat do the same for its layers."
        )


def check_image_size(recipe: Recipe, model: Model) -> None:
    """Raises ModelError where a network of the user's own takes other images than the recipe's."""
    side = recipe.preprocessing.image_size
    if isinstance(model, models.Linen | models.NNX) and model.shape != (side, side, 3):
        raise ModelError(
            f"{model.name} takes images of shape {model.shape}, and the recipe's are "
            f"{(side, side, 3)}: set the recipe's image_size to the network's, or build the "
            "network with the recipe's shape."
        )


def open_splits(recipe: Recipe, given: Source | Splits | None) -> Splits:
    """The recipe's images, those given or those it names; decoded ones are kept as they fit.

    Raises DataError for what is wrong with them, or if they are all of one class.
    """
    splits = data.open_source(
        recipe.data if given is None else given,
        train=recipe.train_split,
        val=recipe.val_split,
        shots=recipe.shots,
        seed=recipe.seed,
        on_bad_image=recipe.on_bad_image,
    )
    present = np.unique(splits.train.targets)
    if len(present) == 1:
        raise DataError(
            f"{recipe.data}: all images to train on are of one class, "
            f"'{splits.train.classes[present[0]]}', so that any answer would be right. Add images "
            "of what is to be told from it, as a class such as 'other'."
        )
    count = sum(map(len, splits))

    def kept(source: Source) -> Source:
        if isinstance(source, Arrays):  # is in memory
            return source
        return Cached(source, recipe.cache_mib * 2**20 * len(source) // count)

    remarks = (*splits.remarks, *_dropped(recipe, len(splits.train)))
    return Splits(kept(splits.train), kept(splits.val), remarks)


def _dropped(recipe: Recipe, images: int) -> list[str]:
    """Remarks of what `drop_last` leaves out of each epoch, by the stages' batch sizes."""
    if not recipe.drop_last or recipe.balance == "sampling":
        return []
    sizes = dict.fromkeys(recipe.during(stage).batch_size for stage in recipe.stages)
    return [
        f"drop_last leaves out {images % size} of {images:,} images in each epoch, other ones each "
        f"time: they do not fill a batch of {size}."
        for size in sizes
        if images % size
    ]


def read_weights(
    recipe: Recipe, model: Model, classes: Sequence[str]
) -> tuple[Weights | None, Recipe]:
    """The recipe's weights, and the recipe with the preprocessing that they expect.

    Raises WeightsError if they do not fit the network, or bring a head of other classes to keep.
    """
    if recipe.weights is None:
        return None, recipe.expecting(Preprocessing())
    source = weights.read(recipe.weights, own_names=not model.torch_named)
    source = fitted(source, model, recipe.head, wanted_classes(recipe, classes))
    return source, recipe.expecting(source.preprocessing or Preprocessing())


def wanted_classes(recipe: Recipe, classes: Sequence[str]) -> Sequence[str] | None:
    """The classes that a head which is kept must be of; None if it may be of any."""
    return classes if recipe.head_classes == "match" else None


def open_network(recipe: Recipe, given: Model | None, classes: tuple[str, ...]) -> Model:
    """The network given, or that of the recipe; RecipeError if it has not these classes."""
    model = given or recipe.network(len(classes))
    if given is None and user_factory.names_factory(recipe.model):
        _check_own(recipe, model)
    if model.num_classes != len(classes):
        raise RecipeError(
            f"{model.name} has {model.num_classes} classes, and the images have {len(classes)}: "
            f"{', '.join(classes)}."
        )
    return model


def open_programs(
    recipe: Recipe, model: Model, splits: Splits, devices: Devices, like: Start
) -> tuple[Program, ...]:
    """A program for each of the recipe's stages; `like` may be shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the console shows the remarks when their stage begins
        plans = plan(recipe.stages, like[0])
    programs = [
        program(index, stage, recipe, model, splits.train, devices, like)
        for index, stage in enumerate(plans)
    ]
    return keeping(programs, *like, images=(len(splits.train), len(splits.val)))
