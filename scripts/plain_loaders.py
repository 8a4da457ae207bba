"""Loaders of other libraries for `benchmark_data.py`: the same crops, flips and batches.

Each function returns how to start a loader by name, or nothing if its library is not installed. A
started loader yields the number of images in each batch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data import Preprocessing, Source
from jaxft.data.preprocessing import train_view

Epochs = Callable[[], Iterable[int]]
"""Starts a pipeline, which yields the number of images in each batch of its epochs."""


class Setting(NamedTuple):
    """What all pipelines have in common: batches of random crops of `size` pixels."""

    data: Path
    epochs: int
    batch_size: int
    size: int
    workers: int


def torch_loaders(setting: Setting) -> dict[str, Epochs]:
    """Returns torch's `DataLoader` with float32 images, normalised on the host, and with uint8."""
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
        crop = [transforms.RandomResizedCrop(setting.size), transforms.RandomHorizontalFlip()]
        loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(setting.data / "train", transforms.Compose([*crop, *ending])),
            batch_size=setting.batch_size,
            shuffle=True,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
        )
        for _ in range(setting.epochs):
            for images, _ in loader:
                yield len(images)

    return {name: partial(run, ending) for name, ending in endings.items()}


def _grain_view(source: Source, size: int, index: int, rng: np.random.Generator) -> Any:
    image, target = source[index]
    return train_view(image, Preprocessing(image_size=size), "crop_flip", rng), target


def grain_loaders(setting: Setting, source: Source) -> dict[str, Epochs]:
    """Returns Grain's `MapDataset` with jaxft's views, in threads and in processes."""
    try:
        import grain
        from absl import flags
    except ImportError:
        return {}
    flags.FLAGS.mark_as_parsed()  # its processes read absl's flags

    def run(processes: int) -> Iterator[int]:
        views = grain.MapDataset.range(len(source)).seed(0).shuffle()
        views = views.repeat(setting.epochs).random_map(partial(_grain_view, source, setting.size))
        options = grain.ReadOptions(
            num_threads=1 if processes else setting.workers,
            prefetch_buffer_size=4 * setting.batch_size,
        )
        batches = views.to_iter_dataset(options).batch(setting.batch_size)
        if processes:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes))
        with closing(iter(batches)) as iterator:  # ends its processes
            for images, _ in iterator:
                yield len(images)

    return {"grain, threads": partial(run, 0), "grain, processes": partial(run, setting.workers)}


def tf_loaders(setting: Setting) -> dict[str, Epochs]:
    """Returns `tf.data` with TensorFlow's own decoder and crops, which cannot use processes."""
    try:
        import tensorflow as tf
    except ImportError:
        return {}

    def load(path: Any) -> Any:
        content = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(content), tf.zeros((1, 0, 4)), area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], size[:2]], 0)
        crop = tf.image.decode_and_crop_jpeg(content, window, channels=3)
        crop = tf.image.resize(crop, (setting.size, setting.size))
        return tf.cast(tf.image.random_flip_left_right(crop), tf.uint8)

    def run() -> Iterator[int]:
        paths = tf.data.Dataset.list_files(str(setting.data / "train/*/*"), shuffle=True)
        views = paths.map(load, num_parallel_calls=setting.workers)
        for _ in range(setting.epochs):
            for images in views.batch(setting.batch_size).prefetch(2):
                yield len(images)

    return {"tf.data": run}
