"""Refusal of batches of one image where a norm layer would get one value per channel."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.models import Model, Norms
from jaxft.train.batch_sizes import BatchSizes


def check_single_image(
    model: Model,
    trees: tuple[Tree, Tree],
    norms: Norms,
    sizes: BatchSizes,
    *,
    image_size: int,
    accumulate: int = 1,
    replicas: int = 1,
    reaches_last: bool = True,
) -> None:
    """Checks that batch statistics are of more than one value per channel, as torch does.

    A batch, a part of it by `accumulate`, or the share of a replica may be a single image; that
    matters where a norm layer that uses batch statistics sees a map of 1x1 pixels.

    Args:
      trees: parameters and statistics, or their shapes.
      reaches_last: whether the stage has steps enough to see an epoch's last batch.

    Raises:
      RecipeError: a norm layer would see one value per channel.
    """
    part = sizes.batch_size // accumulate
    batches = {sizes.batch_size, *([sizes.last] if reaches_last else [])}
    parts = {count for n in batches for count in (min(part, n), n % part)}
    share = -(-part // replicas) if accumulate > 1 else sizes.rows // replicas
    shares = {min(share, n - i * share) for n in parts for i in range(replicas)}
    if 1 not in shares:
        return
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    try:
        jax.eval_shape(partial(model.apply, norms=norms), *trees, image)
    except ValueError as error:
        if "more than one value per channel" not in str(error):
            raise
        where = "a batch" if part == sizes.batch_size else "a part of a batch"
        if sizes.last != sizes.batch_size:
            where += " (or of an epoch's last one)" if accumulate > 1 else ", or the last one,"
        raise RecipeError(
            f"{where} has a single image, on which {error}, as in torch. Set drop_last=True or "
            "another batch_size or accumulate, or norms 'B' (frozen layers) or 'E' (layers that "
            "train), which use running statistics."
        ) from error
