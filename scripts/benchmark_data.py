"""Measures images per second of jaxft's batches and of other libraries' loaders on one folder.

    python scripts/benchmark_data.py data/hymenoptera

All pipelines read PATH/train/<class>/*, take random crops of 224 pixels, flip, and shuffle into
batches. Each round runs every pipeline from its start. The first table shows medians and ranges
over the rounds. The first epoch includes the start of threads or processes, and is left out of all
other columns. "per core" is the number of images per second of processor time of all processes; it
varies less than images per second if other programs use the machine too. "main" is the processor
time of the main process for an image, in milliseconds. With worker processes, one main process
cannot yield more than 1000 / main images per second.

jaxft's pipelines are threads, worker processes, both with decoded images in memory, processes with
colour jitter on the host and on the device (without the device's time), and cached features of a
ResNet-50. The others are torch's DataLoader (float32, normalised on the host, and
uint8), Grain with jaxft's views, and tf.data, as far as they are installed.

With `--plan FILE ...`, files that `plan.py --json FILE` has written, the second table shows the
images per second that each stage takes on all hosts of the topology together, and the cores that
read as many at the rates above.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import psutil
from plain_loaders import Epochs, Setting, grain_loaders, tf_loaders, torch_loaders

from jaxft.data import Augment, BatchConfig, Preprocessing, Source, open_source, train_batches
from jaxft.data.image_cache import Cached
from jaxft.data.process_source import in_processes

FEATURES = {"head": (2048,), "late": (14, 14, 1024)}  # of an image, in bfloat16


def ours(
    source: Source,
    setting: Setting,
    features: np.ndarray | None = None,
    *,
    augment: Augment = "crop_flip",
    on_device: bool = False,
) -> Iterator[int]:
    """Yields the sizes of jaxft's batches; a device's share of the augmentation is left out."""
    config = BatchConfig(
        preprocessing=Preprocessing(image_size=setting.size),
        augment=augment,
        augment_on_device=on_device,
        batch_size=setting.batch_size,
        seed=0,
        stage=0,
    )
    rows: Callable[[int], np.ndarray] | None = None if features is None else lambda view: features
    for batch in train_batches(
        source, config, epochs=setting.epochs, workers=setting.workers, features=rows
    ):
        yield int(batch.mask.sum())


def ours_cached(source: Source, setting: Setting) -> Iterator[int]:
    """Yields the sizes of jaxft's batches from decoded images in memory."""
    return ours(Cached(source, 2**34), setting)


def ours_in_processes(source: Source, setting: Setting, **view: Any) -> Iterator[int]:
    """Yields the sizes of jaxft's batches, read by worker processes."""
    (pooled,) = in_processes([source], setting.workers)
    yield from ours(pooled, setting, **view)
    pooled.workers.close()


def our_pipelines(source: Source, setting: Setting) -> dict[str, Epochs]:
    """Returns jaxft's pipelines by name."""
    images = {
        "threads": partial(ours, source, setting),
        "processes": partial(ours_in_processes, source, setting),
        "threads, decoded": partial(ours_cached, source, setting),
        "processes, decoded": partial(ours_in_processes, Cached(source, 2**34), setting),
    }
    for name, read in (("jitter", source), ("decoded, jitter", Cached(source, 2**34))):
        images |= {
            f"processes, {name}{place}": partial(
                ours_in_processes, read, setting, augment="jitter", on_device=bool(place)
            )
            for place in ("", " on device")
        }
    rows = {
        stage: np.zeros((len(source), *shape), ml_dtypes.bfloat16)
        for stage, shape in FEATURES.items()
    }
    features = {
        f"features of {stage}": partial(ours, source, setting, array)
        for stage, array in rows.items()
    }
    return images | features


class Rates(NamedTuple):
    """Rates of one pipeline in one round.

    Attributes:
      first: images per second in the first epoch.
      later: images per second in the later epochs.
      per_core: images per second of processor time of all processes, in the later epochs.
      main: milliseconds of processor time of the main process per image, in the later epochs.
    """

    first: float
    later: float
    per_core: float
    main: float


def rates(start: Epochs, images: int, epochs: int) -> Rates:
    """Runs a pipeline over `images` images an epoch and returns its rates."""
    gc.collect()  # ends the processes of the previous pipeline
    seen, begin, ends = 0, time.perf_counter(), [(0.0, 0.0, 0.0)]
    for count in start():
        seen += count
        if seen >= images * len(ends):  # batches of some loaders reach into the next epoch
            ends.append((time.perf_counter() - begin, *_cpu_seconds()))
    assert (seen, len(ends)) == (images * epochs, epochs + 1)
    seconds, main, workers = np.subtract(ends[-1], ends[1])
    later = images * (epochs - 1)
    return Rates(
        first=images / ends[1][0],
        later=later / seconds,
        per_core=later / (main + workers),
        main=1000 * main / later,
    )


def _cpu_seconds() -> tuple[float, float]:
    """Returns the processor seconds of this process, and of its living children."""
    children = psutil.Process().children(recursive=True)
    return time.process_time(), sum(sum(child.cpu_times()[:2]) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="threads or processes")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each pipeline in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="of `plan.py --json`")
    options = parser.parse_args()

    source = open_source(f"folder:{options.data}").train  # reads all files into the page cache
    setting = Setting(options.data, options.epochs, options.batch_size, 224, options.workers)
    others = {
        "torch": torch_loaders(setting),
        "Grain": grain_loaders(setting, source),
        "TensorFlow": tf_loaders(setting),
    }
    pipelines = our_pipelines(source, setting)
    for library, loaders in others.items():
        if not loaders:
            print(f"{library} is not installed and not measured.")
        pipelines |= loaders
    measured: dict[str, list[Rates]] = {name: [] for name in pipelines}
    for _ in range(options.rounds):
        for name, start in pipelines.items():
            measured[name].append(rates(start, len(source), options.epochs))

    print(
        f"{len(source)} images, {options.epochs} epochs in batches of {options.batch_size}, "
        f"{options.workers} workers, {os.cpu_count()} cores, {options.rounds} rounds\n"
    )
    print_rates(measured)
    if options.plan:
        names = ["processes", "processes, decoded"]
        print(f"\n| topology | stage | images/s | cores: {' | cores: '.join(names)} |")
        print("|---" * (3 + len(names)) + "|")
    for plan in options.plan:
        print_needs(plan, {name: _median(measured[name], "per_core") for name in names})


def _median(rounds: list[Rates], field: str) -> float:
    return statistics.median(getattr(each, field) for each in rounds)


def print_rates(measured: dict[str, list[Rates]]) -> None:
    """Prints medians, and the range of the images per second in later epochs."""
    print("| pipeline | images/s, epoch 1 | later | range | per core | main, ms |")
    print("|---|---|---|---|---|---|")
    for name, rounds in measured.items():
        first, later, per_core, main = (_median(rounds, field) for field in Rates._fields)
        low, high = (f(each.later for each in rounds) for f in (min, max))
        print(
            f"| {name} | {first:,.0f} | {later:,.0f} | {low:,.0f}-{high:,.0f} | {per_core:,.0f} "
            f"| {main:.3f} |"
        )


def print_needs(plan: Path, per_core: dict[str, float]) -> None:
    """Prints the images per second that each stage of a plan takes, and the cores for them.

    Args:
      plan: file of `jaxft plan --json`.
      per_core: images per second and core of each pipeline.
    """
    facts = json.loads(plan.read_text())
    for stage in facts["stages"]:
        low, high = stage["images_per_second"]
        cores = [f"{low / rate:,.0f}-{high / rate:,.0f}" for rate in per_core.values()]
        if stage["frozen_prefix"]["cached_for_training"]:
            cores = ["features are cached"] * len(cores)
        row = (facts["topology"], stage["stage"], f"{low:,.0f}-{high:,.0f}", *cores)
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
