"""Checks that the features of an image depend on that image alone, so that they can be cached."""

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError
from jaxft.labels import Tree
from jaxft.matmul_precision import with_precision
from jaxft.models.lora_model import without_lora
from jaxft.models.nnx_adapter import NNXModel
from jaxft.train.stage_program import StageProgram


def check_features(
    program: StageProgram, params: Tree, stats: Tree, images: jax.Array, features: jax.Array
) -> None:
    """Checks the features of a batch's first image.

    A user's module may let the images of a batch influence each other, or compute something else in
    training mode. Then cached features would be wrong. The networks of jaxft do neither.

    Args:
      program: the stage.
      params, stats: the weights.
      images: a batch `[b h w c]` as it reaches the devices.
      features: its features `[b ...]`.

    Raises:
      ModelError: the first image has other features among darker images, or in training mode if
        features of training images are cached.
    """
    model, prefix = program.model, program.prefix
    if isinstance(without_lora(model), NNXModel):
        return
    in_training = prefix.train and program.plan.stage.linear_probe is None
    key = jax.random.key(0) if in_training else None

    def difference(
        params: Tree, stats: Tree, images: jax.Array, features: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        images = images.at[1:].set((images[1:] / 2).astype(images.dtype))
        x = program.recipe.preprocessing.normalize(images)
        again, _ = model.apply(params, stats, x, norms="running", key=key, last=prefix.blocks[-1])
        return abs(again[0] - features[0]).max(), abs(features[0]).max()

    compare = jax.jit(with_precision(difference, program.recipe.matmul_precision))
    change, largest = map(float, jax.device_get(compare(params, stats, images, features)))
    tolerance = max(0.02, float(jnp.finfo(features.dtype).eps) ** 0.5)
    if change > tolerance * largest:
        raise ModelError(
            f"stage {program.plan.stage.name!r}: features of {model.name} cannot be cached. After "
            f"block {prefix.blocks[-1]}, the features of an image change by {change:.2g} (the "
            f"largest is {largest:.2g}) {'in training mode, or ' * in_training}with the other "
            "images. Set cache_mib=0, and device_cache_mib=0 on accelerators, to compute them in "
            "each step."
        )
