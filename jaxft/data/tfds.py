"""Image classification sets of TensorFlow Datasets, read without TensorFlow from array_record.

TFDS is imported inside the functions: it takes a while to load, and only these data need it.
"""

import difflib
import os
import socket
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.decode import decode
from jaxft.data.source import Collection
from jaxft.data.split_expressions import shown
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class Records:
    """A `Source` of a split of encoded images, which are decoded on access.

    records: the split's, each the bytes of a tf.Example; picklable, and safe between threads.
    features: the two features of a record that are parsed.
    image, label: their names.
    indices: int64 [n], which of the records.
    version: what tells the split from other versions and copies of it.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    records: Any
    features: Any
    image: str
    label: str
    indices: np.ndarray

    @cached_property
    def targets(self) -> np.ndarray:
        """All targets, int32 [n]; the first use reads every record.

        Raises:
          DataError: a record cannot be read, or has no label.
        """
        found = np.array([self._parsed(k)[self.label] for k in range(len(self))], np.int32)
        if len(without := np.flatnonzero((found < 0) | (found >= len(self.classes)))):
            raise DataError(
                f"{self.name}: {len(without)} of {len(self)} images have no label (the first is "
                f"{found[without[0]]}, where 0..{len(self.classes) - 1} are classes): use a split "
                "that is labelled."
            )
        return found

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target; a DataError if the record has become unreadable."""
        example = self._parsed(index)
        try:
            return decode(example[self.image]), int(example[self.label])
        except DataError as error:
            raise DataError(f"{self._place(index)} cannot be read: {error}") from error

    def problem(self, index: int, /) -> str | None:
        """The record and why its image cannot be decoded, or None if it can."""
        return validate.problem(self._parsed(index)[self.image], self._place(index))

    def identity(self, index: int, /) -> str:
        """Returns the version of the split, and the record's position in it."""
        return f"{self.version}[{self.indices[index]}]"

    def take(self, indices: np.ndarray) -> "Records":
        """The source of these examples only, with the same classes."""
        taken = replace(self, indices=self.indices[indices])
        if "targets" in self.__dict__:  # read already: not once more
            taken.__dict__["targets"] = self.targets[indices]
        return taken

    def _parsed(self, index: int) -> dict[str, Any]:
        from tensorflow_datasets import decode as tfds_decode

        try:
            record = self.records[int(self.indices[index])]
            # The encoded bytes: all sources share one decoder.
            skip = {self.image: tfds_decode.SkipDecoding()}
            return self.features.deserialize_example_np(record, decoders=skip)
        except Exception as error:  # from riegeli's ValueError to protobuf's own
            raise DataError(
                f"{self._place(index)} cannot be read: {error}. Its file is damaged: prepare the "
                "data set again."
            ) from error

    def _place(self, index: int) -> str:
        return f"{self.name}[{self.indices[index]}]"


def find(name: str) -> Collection:
    """The splits of a set by its TFDS name (`cifar10`, `NAME/CONFIG:VERSION`), prepared if not yet.

    Raises:
      DataError: no such set, it cannot be prepared, or as in `find_prepared`.
    """
    from jaxft.data.digits_builder import SklearnDigits  # imported, it is known to TFDS

    if not name:
        raise DataError("data 'tfds:' names no set: write tfds:NAME, such as tfds:cifar10.")
    builder = _load(name)
    if not builder.is_prepared():
        builder = _load(name, file_format="array_record")
        if builder.info.features is not None:
            _image_and_label(f"tfds:{name}", builder.info)  # before hours of downloading
        prepare = (
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            "file_format='array_record').download_and_prepare()\""
        )
        where = (
            f"tfds:{name} is not prepared in {builder.data_dir}. Prepare it where there is a "
            f"network, and copy it or point TFDS_DATA_DIR to it: {prepare}"
        )
        if not isinstance(builder, SklearnDigits) and _offline():
            raise DataError(f"{where}\nIt cannot be downloaded now: this machine is offline.")
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever downloading, unpacking and parsing raise
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{where}\nPreparing it failed. {reason}") from error
    return _collection(f"tfds:{name}", builder)


def find_prepared(place: str) -> Collection:
    """The splits of a set in a folder that TFDS prepared: the one that holds dataset_info.json.

    Raises:
      DataError: no such folder, another format than array_record, or no images and labels.
    """
    import tensorflow_datasets as tfds

    root = Path(place).expanduser()
    if not place or not (root / "dataset_info.json").is_file():
        # At most NAME/CONFIG/VERSION below: a whole disk is not searched.
        below = ["*/" * depth + "dataset_info.json" for depth in (1, 2, 3)] if place else []
        within = [str(found.parent) for pattern in below for found in root.glob(pattern)]
        guess = f" Did you mean {shown(sorted(within))}?" if within else ""
        raise DataError(
            f"tfds_dir:{place} is not a folder that TFDS prepared: it holds no dataset_info.json "
            f"(looked from {Path.cwd()}).{guess}"
        )
    try:
        builder = tfds.builder_from_directory(root)
    except Exception as error:  # a damaged JSON file, features of another version
        raise DataError(f"tfds_dir:{place} cannot be read: {error}") from error
    return _collection(f"tfds_dir:{place}", builder)


def _load(name: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        # TFDS itself reads the variable only when it is imported.
        return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), **options)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, n=3)
        guess = f"Did you mean {' or '.join(near)}?" if near else "See tfds.list_builders()."
        raise DataError(f"tfds:{name}: TFDS knows no such data set. {guess}") from error
    except Exception as error:  # a wrong config or version, or no name at all
        raise DataError(f"tfds:{name}: {error}") from error


def _offline() -> bool:
    """Whether no name can be resolved: TFDS would try for minutes, host by host."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        return True
    return False


def _collection(name: str, builder: Any) -> Collection:
    available = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in available:
        raise DataError(
            f"{name} is prepared as {', '.join(sorted(available))} in {builder.data_path}; reading "
            "without TensorFlow needs array_record. Prepare it anew in another folder (set "
            "TFDS_DATA_DIR), or convert it where TensorFlow is installed: tfds convert_format "
            f"--dataset_version_dir={builder.data_path} --out_file_format=array_record"
        )
    image, label = _image_and_label(name, builder.info)
    return Collection(name, tuple(builder.info.splits), partial(_read, name, builder, image, label))


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The supervised pair, if it is an image and its class; else the only ones there are."""
    from tensorflow_datasets import features

    named = dict(info.features)

    def is_image(key: str) -> bool:  # float images are bits in disguise, LabeledImage a mask
        feature = named.get(key)
        return type(feature) is features.Image and info.features[key].np_dtype != np.float32

    def is_label(key: str) -> bool:
        feature = named.get(key)
        return isinstance(feature, features.ClassLabel) and bool(feature.num_classes)

    match info.supervised_keys:
        case (str(image), str(label)) if is_image(image) and is_label(label):
            return image, label
    images, labels = list(filter(is_image, named)), list(filter(is_label, named))
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    listing = "".join(f"\n  {key}: {type(feature).__name__}" for key, feature in named.items())
    raise DataError(
        f"{name} is not an image classification set: it needs one Image and one ClassLabel, but "
        f"has {len(images)} and {len(labels)}. Its features:{listing}"
    )


def _read(
    name: str, builder: Any, image: str, label: str, splits: Sequence[str]
) -> dict[str, Records]:
    import tensorflow_datasets as tfds

    features = builder.info.features
    classes = tuple(features[label].int2str(k) for k in range(features[label].num_classes))
    found = {}
    for split in splits:
        count = builder.info.splits[split].num_examples
        try:
            source = builder.as_data_source(
                split=split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        except Exception as error:  # a file is gone
            raise DataError(f"{name}: split {split} cannot be opened: {error}") from error
        found[split] = Records(
            name=f"{name} {split}",
            version=f"{builder.info.full_name} {split} {builder.info.splits[split].num_bytes}",
            classes=classes,
            records=source.data_source,
            # Of other features (masks, boxes, texts) nothing is parsed.
            features=tfds.features.FeaturesDict({key: features[key] for key in (image, label)}),
            image=image,
            label=label,
            indices=np.arange(count),
        )
    return found
