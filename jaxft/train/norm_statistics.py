"""Re-estimates the running statistics of norm layers for averaged weights."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.data import Batch, Preprocessing
from jaxft.devices import Devices
from jaxft.labels import Tree, paths, unflatten
from jaxft.matmul_precision import MatmulPrecision, with_precision
from jaxft.models import Model, NormMode
from jaxft.models.norm_modes import layer, norm_layers


def statistics_step(
    model: Model,
    preprocessing: Preprocessing,
    devices: Devices,
    layers: Collection[str],
    *,
    examples: Mapping[int, int],
    precision: MatmulPrecision = "default",
) -> Any:
    """Returns the jitted `(params, stats, batch, number) -> stats`, which adds a batch to a mean.

    Called with each batch of images, `number` from 1, it computes the mean of the batches' means
    and variances in `layers`, as `torch.optim.swa_utils.update_bn` does. All other norm layers use
    their running statistics and keep them. Dropout is off.

    Args:
      model: the network.
      preprocessing: normalises the images.
      devices: where the statistics are placed.
      layers: paths of the norm layers to re-estimate.
      examples: number of examples by number of rows, see `BatchSizes`. The last batch of a network
        without a mask is left out if it is a single image, which may have no variance.
      precision: of float32 products.
    """

    def step(params: Tree, stats: Tree, batch: Batch, number: jax.Array) -> Tree:
        mask = None if examples else batch.mask
        if examples:
            count = examples[len(batch.mask)]
            if count == 1 < max(examples.values()):
                return stats
            batch = jax.tree.map(lambda x: x[:count], batch)
        norms: dict[str, NormMode] = {
            name: "batch_replace" if name in layers else "running" for name in norm_layers(stats)
        }
        images = preprocessing.normalize(batch.image)
        _, new = model.apply(params, stats, images, norms=norms, mask=mask)
        share = 1 / jnp.asarray(number, float)
        means = [
            ((1 - share) * mean + share * x).astype(mean.dtype) if layer(path) in layers else mean
            for path, mean, x in zip(
                paths(stats), jax.tree.leaves(stats), jax.tree.leaves(new), strict=True
            )
        ]
        return devices.constrain(unflatten(stats, means))

    return jax.jit(with_precision(step, precision))
