"""Remarks on settings that waste time on the run's accelerator."""

from collections.abc import Iterable

from jaxft.batch_sizes import BatchSizes
from jaxft.devices import Devices
from jaxft.models import Model

_ROWS = 8  # rows of a tile of a TPU's registers


def device_advice(model: Model, sizes: Iterable[BatchSizes], devices: Devices) -> list[str]:
    """Returns remarks on the type of the computation and on batch sizes that pad badly.

    Args:
      model: the network.
      sizes: batch sizes of the stages.
      devices: where the run runs.
    """
    platform, remarks = devices.platform, []
    if platform in ("tpu", "cuda", "rocm", "gpu") and model.options.get("dtype") == "float32":
        remarks.append(
            "The network computes in float32. --dtype bfloat16 keeps parameters in float32 and "
            "moves half the bytes"
            + (
                "; on a TPU the products are in bfloat16 all the same (see matmul_precision)."
                if platform == "tpu"
                else "."
            )
        )
    if platform == "tpu":
        chips = len(devices)
        for size in sorted({each.batch_size for each in sizes}):
            if size % (_ROWS * chips):
                fitting = max(size // (_ROWS * chips), 1) * _ROWS * chips
                remarks.append(
                    f"batch_size {size:,} is {size / chips:.4g} images a chip. A TPU is fastest at "
                    f"multiples of {_ROWS}, such as batch_size {fitting:,}."
                )
    return remarks
