"""Array shapes of a run's batches: which networks see padding, and which never do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxft.distributed import Devices
from jaxft.models import Model
from jaxft.models.nnx_adapter import NNXModel


@dataclass(frozen=True)
class BatchSizes:
    """Rows of the arrays of full batches and of an epoch's last batch.

    The networks of jaxft leave rows outside a mask out of everything, so all their batches have one
    shape. Nothing is known of a user's network: it may standardise images itself (zeros become NaN)
    or let rows influence each other. It sees the examples of a batch alone, and an epoch's last
    batch has a shape and a compiled program of its own, as in a loop over torch's `DataLoader`.

    Attributes:
      batch_size: examples of a full batch.
      last: examples of the last batch.
      rows: rows of a full batch's arrays, a multiple of the number of devices.
      last_rows: rows of the last batch's arrays.
      masked: whether the network takes batches with padding and a mask.
    """

    batch_size: int
    last: int
    rows: int
    last_rows: int
    masked: bool

    @property
    def examples(self) -> Mapping[int, int]:
        """Number of examples by number of rows; empty for a network that takes a mask."""
        return {} if self.masked else {self.rows: self.batch_size, self.last_rows: self.last}


def batch_sizes(
    model: Model, devices: Devices, images: int, batch_size: int, *, drop_last: bool = False
) -> BatchSizes:
    """Returns the sizes of batches that hold each of so many images once."""
    last = batch_size if drop_last else images % batch_size or batch_size
    rows = last_rows = devices.rows(batch_size)
    masked = isinstance(model, NNXModel)
    if last < batch_size and not masked:
        last_rows = devices.rows(last)
        if last_rows == rows:  # a compiled program is chosen by the number of rows
            last_rows += len(devices)
    return BatchSizes(batch_size, last, rows, last_rows, masked)


def oversized(sizes: Sequence[BatchSizes], images: int) -> list[str]:
    """Returns a remark for each batch size above the number of images that costs time for nothing.

    A network that takes a mask computes all rows of a batch.
    """
    larger = {each.batch_size for each in sizes if each.masked and each.batch_size > images}
    return [
        f"batch_size {size:,} is more than the {images:,} images to train on, and a step computes "
        f"{size:,} rows all the same: batch_size {images} takes less time and memory."
        for size in sorted(larger)
    ]
