"""Reads image classification sets of TensorFlow Datasets from array_record, without TensorFlow.

TFDS is imported inside the functions because it takes long to load.
"""

import difflib
import os
import socket
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.class_names import join_names
from jaxft.data.decode import decode
from jaxft.data.source import Collection
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """A `Source` of a TFDS split; images are decoded on access.

    Attributes:
      name: name of the data set and split in messages.
      version: identifies the version of the data set and the split.
      classes: class names.
      records: the split's records, each the bytes of a tf.Example; picklable and thread-safe.
      features: TFDS features of the image and the label; others are not parsed.
      image_key: name of the image feature.
      label_key: name of the label feature.
      indices: int64 [n], the selected records.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    records: Any
    features: Any
    image_key: str
    label_key: str
    indices: np.ndarray

    @cached_property
    def targets(self) -> np.ndarray:
        """Targets of all examples, int32 [n]; the first access reads every record.

        Raises:
          DataError: a record cannot be read or has no label.
        """
        labels = [self._parse(k)[self.label_key] for k in range(len(self))]
        targets = np.array(labels, np.int32)
        unlabelled = np.flatnonzero((targets < 0) | (targets >= len(self.classes)))
        if len(unlabelled):
            raise DataError(
                f"{self.name}: {len(unlabelled)} of {len(self)} images have no label (the first is "
                f"{targets[unlabelled[0]]}, where 0..{len(self.classes) - 1} are classes): use a "
                "split that is labelled."
            )
        return targets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """Returns the RGB image and its target.

        Raises:
          DataError: the record cannot be read.
        """
        example = self._parse(index)
        try:
            return decode(example[self.image_key]), int(example[self.label_key])
        except DataError as error:
            raise DataError(f"{self._place(index)} cannot be read: {error}") from error

    def problem(self, index: int, /) -> str | None:
        """Returns the record and why its image cannot be decoded, or None if it can."""
        return validate.problem(self._parse(index)[self.image_key], self._place(index))

    def identity(self, index: int, /) -> str:
        """Returns the version of the split and the record's position in it."""
        return f"{self.version}[{self.indices[index]}]"

    def take(self, indices: np.ndarray) -> "TfdsSource":
        """Returns the source of these examples only, with the same classes."""
        subset = replace(self, indices=self.indices[indices])
        if "targets" in self.__dict__:  # avoids reading the records again
            subset.__dict__["targets"] = self.targets[indices]
        return subset

    def _parse(self, index: int) -> dict[str, Any]:
        from tensorflow_datasets import decode as tfds_decode

        try:
            record = self.records[int(self.indices[index])]
            # Keeps the encoded bytes, so that all sources use the same decoder.
            skip = {self.image_key: tfds_decode.SkipDecoding()}
            return self.features.deserialize_example_np(record, decoders=skip)
        except Exception as error:  # ValueError from riegeli, DecodeError from protobuf
            raise DataError(
                f"{self._place(index)} cannot be read: {error}. Its file is damaged: prepare the "
                "data set again."
            ) from error

    def _place(self, index: int) -> str:
        return f"{self.name}[{self.indices[index]}]"


def find(name: str) -> Collection:
    """Returns the splits of a data set by its TFDS name; prepares the data set if necessary.

    Args:
      name: `cifar10` or `NAME/CONFIG:VERSION`.

    Raises:
      DataError: there is no such data set, it cannot be prepared, its format is not array_record,
        or it has no images and labels.
    """
    import tensorflow_datasets as tfds

    if not name:
        raise DataError("data 'tfds:' names no set: write tfds:NAME, such as tfds:cifar10.")
    builder = _load(name)
    if not builder.is_prepared():
        builder = _load(name, file_format="array_record")
        if builder.info.features is not None:
            _find_keys(f"tfds:{name}", builder.info)  # fail before a long download
        command = (
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            "file_format='array_record').download_and_prepare()\""
        )
        instructions = (
            f"tfds:{name} is not prepared in {builder.data_dir}. Prepare it where there is a "
            f"network, and copy it or point TFDS_DATA_DIR to it: {command}"
        )
        if _is_offline():
            raise DataError(f"{instructions}\nIt cannot be downloaded: this machine is offline.")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()  # prints carriage returns into logs
        try:
            builder.download_and_prepare()
        except Exception as error:  # downloading, unpacking and parsing raise many types
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{instructions}\nPreparing it failed. {reason}") from error
    return _collection(f"tfds:{name}", builder)


def find_prepared(place: str) -> Collection:
    """Returns the splits of a data set in a folder that TFDS prepared.

    Args:
      place: the folder that contains dataset_info.json.

    Raises:
      DataError: there is no such folder, its format is not array_record, or it has no images and
        labels.
    """
    import tensorflow_datasets as tfds

    root = Path(place).expanduser()
    if not place or not (root / "dataset_info.json").is_file():
        # Prepared folders lie at most three levels below: NAME/CONFIG/VERSION.
        patterns = ["*/" * depth + "dataset_info.json" for depth in (1, 2, 3)] if place else []
        prepared = [str(path.parent) for pattern in patterns for path in root.glob(pattern)]
        hint = f" Did you mean {join_names(sorted(prepared))}?" if prepared else ""
        raise DataError(
            f"tfds_dir:{place} is not a folder that TFDS prepared: it holds no dataset_info.json "
            f"(looked from {Path.cwd()}).{hint}"
        )
    try:
        builder = tfds.builder_from_directory(root)
    except Exception as error:  # a damaged JSON file, or unknown features
        raise DataError(f"tfds_dir:{place} cannot be read: {error}") from error
    return _collection(f"tfds_dir:{place}", builder)


def _load(name: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        # Passed here because TFDS reads the variable only on import.
        return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), **options)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        similar = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "See tfds.list_builders()."
        raise DataError(f"tfds:{name}: TFDS knows no such data set. {hint}") from error
    except Exception as error:  # a wrong config, version or name
        raise DataError(f"tfds:{name}: {error}") from error


def _is_offline() -> bool:
    """Returns whether host names cannot be resolved; TFDS would retry for minutes."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        return True
    return False


def _collection(name: str, builder: Any) -> Collection:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"{name} is prepared as {', '.join(sorted(formats))} in {builder.data_path}; reading "
            "without TensorFlow needs array_record. Prepare it again in another folder (set "
            "TFDS_DATA_DIR), or convert it where TensorFlow is installed: tfds convert_format "
            f"--dataset_version_dir={builder.data_path} --out_file_format=array_record"
        )
    image_key, label_key = _find_keys(name, builder.info)
    read = partial(_read, name, builder, image_key, label_key)
    return Collection(name, tuple(builder.info.splits), read)


def _find_keys(name: str, info: Any) -> tuple[str, str]:
    """Returns the names of the image and label features.

    These are the supervised keys if they are an image and its class, or else the only image and
    the only class label.

    Raises:
      DataError: there is no such pair.
    """
    from tensorflow_datasets import features

    by_key = dict(info.features)

    # Excludes float images, whose bits are stored as RGBA, and the subclass LabeledImage, a mask.
    def is_image(key: str) -> bool:
        feature = by_key.get(key)
        return type(feature) is features.Image and info.features[key].np_dtype != np.float32

    def is_label(key: str) -> bool:
        feature = by_key.get(key)
        return isinstance(feature, features.ClassLabel) and bool(feature.num_classes)

    match info.supervised_keys:
        case (str(image), str(label)) if is_image(image) and is_label(label):
            return image, label
    images, labels = list(filter(is_image, by_key)), list(filter(is_label, by_key))
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    listing = "".join(f"\n  {key}: {type(feature).__name__}" for key, feature in by_key.items())
    raise DataError(
        f"{name} is not an image classification set: it needs one Image and one ClassLabel, but "
        f"has {len(images)} and {len(labels)}. Its features:{listing}"
    )


def _read(
    name: str, builder: Any, image_key: str, label_key: str, splits: Sequence[str]
) -> dict[str, TfdsSource]:
    import tensorflow_datasets as tfds

    features = builder.info.features
    label = features[label_key]
    classes = tuple(label.int2str(k) for k in range(label.num_classes))
    sources = {}
    for split in splits:
        count = builder.info.splits[split].num_examples
        try:
            data_source = builder.as_data_source(
                split=split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        except Exception as error:  # a missing file
            raise DataError(f"{name}: split {split} cannot be opened: {error}") from error
        sources[split] = TfdsSource(
            name=f"{name} {split}",
            version=f"{builder.info.full_name} {split} {builder.info.splits[split].num_bytes}",
            classes=classes,
            records=data_source.data_source,
            features=tfds.features.FeaturesDict({k: features[k] for k in (image_key, label_key)}),
            image_key=image_key,
            label_key=label_key,
            indices=np.arange(count),
        )
    return sources
