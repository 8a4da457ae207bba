"""From a source spec to batches of images: `open_source`, a `Preprocessing`, the batches."""

from jaxft.data.arrays import arrays
from jaxft.data.batches import Batch, eval_batches, steps_per_epoch, train_batches
from jaxft.data.preprocessing import Augment, Preprocessing
from jaxft.data.sources import Source, Splits, open_source

__all__ = [
    "Augment",
    "Batch",
    "Preprocessing",
    "Source",
    "Splits",
    "arrays",
    "eval_batches",
    "open_source",
    "steps_per_epoch",
    "train_batches",
]
