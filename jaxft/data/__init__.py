"""Reads images and prepares batches: `open_source`, `Preprocessing`, `train_batches`."""

from jaxft.data.arrays import arrays
from jaxft.data.augment import View
from jaxft.data.batches import Batch, BatchConfig, eval_batches, steps_per_epoch, train_batches
from jaxft.data.fingerprint import fingerprint
from jaxft.data.image_cache import Cached
from jaxft.data.open_source import open_source
from jaxft.data.preprocessing import Preprocessing
from jaxft.data.source import Source, Splits
from jaxft.data.validate import Check, OnBadImage
from jaxft.stage_options import Augment, Balance

__all__ = [
    "Augment",
    "Balance",
    "Batch",
    "BatchConfig",
    "Cached",
    "Check",
    "OnBadImage",
    "Preprocessing",
    "Source",
    "Splits",
    "View",
    "arrays",
    "eval_batches",
    "fingerprint",
    "open_source",
    "steps_per_epoch",
    "train_batches",
]
