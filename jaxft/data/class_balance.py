"""Classes of unequal size: weights for the loss, or draws in which each class is as likely."""

import numpy as np

from jaxft.data.source import Source


def class_weights(source: Source) -> tuple[float, ...]:
    """Inverse to the classes' numbers of images, n / (k n_c); of an image, 1 on average.

    scikit-learn's `class_weight="balanced"`. A class without images weighs 0.
    """
    counts = np.bincount(source.targets, minlength=len(source.classes))
    present = np.count_nonzero(counts)
    weights = np.divide(len(source), present * counts, out=np.zeros(len(counts)), where=counts > 0)
    return tuple(float(weight) for weight in weights)


def balanced_draws(source: Source, rng: np.random.Generator) -> np.ndarray:
    """As many examples as the source has, with replacement and equal odds of classes, int64 [n].

    torch's `WeightedRandomSampler` with weights inverse to the classes' numbers of images.
    """
    odds = np.asarray(class_weights(source))[source.targets]
    return rng.choice(len(source), size=len(source), p=odds / odds.sum())
