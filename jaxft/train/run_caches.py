"""Images and caches that several runs in one process share."""

from dataclasses import dataclass

from jaxft.array_cache import ArrayCache
from jaxft.data import Splits
from jaxft.open_recipe import close_splits
from jaxft.recipe import Recipe


@dataclass(frozen=True)
class RunCaches:
    """Opened images, cached features and validation batches.

    Runs that share them must have the same network, images and preprocessing. The key of cached
    features contains a hash of the weights that computed them, so that runs whose frozen blocks
    have the same weights share them.

    Attributes:
      splits: images, with their cache of decoded ones.
      features: features of frozen blocks; see `jaxft.train.feature_cache`.
      batches: validation batches; the same cache as `features` unless features are on disk.
    """

    splits: Splits
    features: ArrayCache
    batches: ArrayCache

    @classmethod
    def of_recipe(cls, recipe: Recipe, splits: Splits) -> "RunCaches":
        """Returns empty caches of the sizes that the recipe sets."""
        memory = ArrayCache(recipe.cache_mib * 2**20)
        disk = ArrayCache(recipe.disk_cache_mib * 2**20) if recipe.disk_cache_mib else memory
        return cls(splits, features=disk, batches=memory)

    def close(self) -> None:
        """Evicts all features and batches, and ends the worker processes of the images.

        Without it, they would stay until Python collects cycles.
        """
        self.features.clear()
        self.batches.clear()
        close_splits(self.splits)
