"""Measures images per second of jaxft's batches and of torch's DataLoader on one folder.

    python scripts/benchmark_data.py data/hymenoptera

All pipelines read PATH/train/<class>/*, take random crops of 224 pixels, flip, and shuffle into
batches. Each round runs every pipeline from its start. The tables show medians and ranges over the
rounds, and ratios to torch. The first epoch includes the start of threads or processes. If other
programs use the machine too, the processor time per image varies less than images per second.

torch produces either float32 images, normalised on the host as in its recipes, or uint8 images, as
jaxft does. jaxft is also measured with processes in place of threads, and with decoded images in
memory. Without torch only jaxft is measured.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxft.data import BatchConfig, Preprocessing, Source, open_source, train_batches
from jaxft.data.image_cache import Cached

Epochs = Callable[[], Iterable[int]]
"""Starts a pipeline, which yields the number of images in each batch of its epochs."""

EPOCHS = 4
SIZE = 224
crops = partial(
    BatchConfig,
    preprocessing=Preprocessing(image_size=SIZE),
    augment="crop_flip",
    seed=0,
    stage=0,
)


def ours(source: Source, batch_size: int, workers: int, epochs: int = EPOCHS) -> Iterator[int]:
    """Yields the sizes of jaxft's batches, made by threads."""
    config = crops(batch_size=batch_size)
    for batch in train_batches(source, config, epochs=epochs, workers=workers):
        yield int(batch.mask.sum())


def ours_cached(source: Source, batch_size: int, workers: int) -> Iterator[int]:
    """Yields the sizes of jaxft's batches from decoded images in memory."""
    return ours(Cached(source, 2**34), batch_size, workers)


def ours_by_processes(source: Source, batch_size: int, workers: int) -> Iterator[int]:
    """Yields the sizes of jaxft's batches, made and pickled by processes."""
    steps = EPOCHS * -(-len(source) // batch_size)
    make = partial(_one_batch, source, batch_size)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        for images, mask in pool.map(make, range(steps)):
            assert images.shape == (batch_size, SIZE, SIZE, 3)
            yield int(mask.sum())


def _one_batch(source: Source, batch_size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    epoch, position = divmod(step, -(-len(source) // batch_size))
    config = crops(batch_size=batch_size)
    batch = next(
        train_batches(source, config, first_epoch=epoch, first_step=position, epochs=EPOCHS)
    )
    return batch.image, batch.mask


def torch_pipelines(data: Path, batch_size: int, workers: int) -> dict[str, Epochs]:
    """Returns torch's pipelines by name; none if torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    try:
        from torchvision import datasets, transforms
    except RuntimeError:  # a CPU build of torch lacks two operators that no transform uses
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        from torchvision import datasets, transforms

    normalize = transforms.Normalize(Preprocessing().mean, Preprocessing().std)
    endings = {
        "torch, float32": [transforms.ToTensor(), normalize],
        "torch, uint8": [transforms.PILToTensor()],
    }

    def run(ending: list) -> Iterator[int]:
        crop = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(data / "train", transforms.Compose([*crop, *ending])),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        for _ in range(EPOCHS):
            for images, _ in loader:
                yield len(images)

    return {name: partial(run, ending) for name, ending in endings.items()}


class Rates(NamedTuple):
    """Rates of one pipeline in one round.

    Attributes:
      first: images per second in the first epoch.
      later: images per second in the later epochs.
      cpu: milliseconds of processor time per image, over all epochs.
    """

    first: float
    later: float
    cpu: float


def rates(start: Epochs, images: int) -> Rates:
    """Runs a pipeline over `images` images an epoch and returns its rates."""
    gc.collect()  # ends the processes of the previous pipeline
    seen, ends, cpu_start = 0, [time.perf_counter()], _cpu_seconds()
    for count in start():
        seen += count
        if seen == images * len(ends):
            ends.append(time.perf_counter())
    assert len(ends) == EPOCHS + 1
    gc.collect()
    first, later = images / (ends[1] - ends[0]), images * (EPOCHS - 1) / (ends[-1] - ends[1])
    return Rates(first, later, 1000 * (_cpu_seconds() - cpu_start) / seen)


def _cpu_seconds() -> float:
    """Returns the processor seconds of this process and of its ended children."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # JAX warns of a fork

    source = open_source(f"folder:{options.data}").train  # reads all files into the page cache
    arguments = source, options.batch_size, options.workers
    pipelines: dict[str, Epochs] = {
        **torch_pipelines(options.data, options.batch_size, options.workers),
        "ours, processes": partial(ours_by_processes, *arguments),
        "ours": partial(ours, *arguments),
        "ours, cached": partial(ours_cached, *arguments),
    }
    measured: dict[str, list[Rates]] = {name: [] for name in pipelines}
    for _ in range(options.rounds):
        for name, start in pipelines.items():
            measured[name].append(rates(start, len(source)))

    print(
        f"{len(source)} images, {EPOCHS} epochs in batches of {options.batch_size}, "
        f"{options.workers} workers, {options.rounds} rounds"
    )
    titles = {"first": "images/s, epoch 1", "later": "images/s, later", "cpu": "CPU ms/image"}
    for field, title in titles.items():
        values = {name: [getattr(r, field) for r in rounds] for name, rounds in measured.items()}
        show(title, values)


def show(title: str, measured: dict[str, list[float]]) -> None:
    """Prints medians, ranges, and the median ratio to each torch pipeline within a round."""
    baselines = [name for name in measured if name.startswith("torch")]
    print(f"\n{title:20}{'median':>9}{'range':>18}" + "".join(f"{b:>16}" for b in baselines))
    for name, values in measured.items():
        span = f"{min(values):.4g} - {max(values):.4g}"
        row = f"{name:20}{statistics.median(values):>9.4g}{span:>18}"
        for base in baselines:
            ratios = [a / b for a, b in zip(values, measured[base], strict=True)]
            row += f"{statistics.median(ratios):>15.2f}x"
        print(row)


if __name__ == "__main__":
    main()
