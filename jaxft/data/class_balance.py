"""Class imbalance: weights for the loss, and balanced sampling."""

import numpy as np

from jaxft.data.source import Source, images_per_class


def class_weights(source: Source) -> tuple[float, ...]:
    """Returns a loss weight per class, inversely proportional to its number of images.

    Class c weighs n / (k n_c) for n images in k non-empty classes, so that images weigh 1 on
    average; an empty class weighs 0. Equals scikit-learn's `class_weight="balanced"`.
    """
    counts = images_per_class(source)
    present = np.count_nonzero(counts)
    weights = np.divide(len(source), present * counts, out=np.zeros(len(counts)), where=counts > 0)
    return tuple(float(weight) for weight in weights)


def balanced_draws(source: Source, rng: np.random.Generator) -> np.ndarray:
    """Draws `len(source)` examples with replacement, all classes with equal probability.

    Equals torch's `WeightedRandomSampler` with inverse class frequencies as weights.

    Returns:
      Indices of the examples, int64 [n].
    """
    weights = np.asarray(class_weights(source))[source.targets]
    return rng.choice(len(source), size=len(source), p=weights / weights.sum())
