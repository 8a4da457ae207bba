"""Reads image classification sets of Hugging Face's `datasets` from a disk.

A set is a folder that `save_to_disk` has written, or a folder of parquet files, which `datasets`
converts once to Arrow files in its cache (HF_DATASETS_CACHE). Arrow files are mapped into memory,
so that an example is read by its index. `datasets` is imported inside the functions because it is
an optional extra and takes long to load.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.decode import decode
from jaxft.data.image_files import printable
from jaxft.data.source import Collection
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class HfSource:
    """A `Source` of a split of a Hugging Face data set; images are decoded on access.

    Attributes:
      name: name of the data set and split in messages.
      version: identifies the split's files.
      classes: class names.
      records: the split, a `datasets.Dataset` whose images are bytes or paths; picklable.
      image_key: name of the image column.
      targets: int32 [n].
      indices: int64 [n], the selected records.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    records: Any
    image_key: str
    targets: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """Returns the RGB image and its target.

        Raises:
          DataError: the image cannot be read.
        """
        try:
            return decode(self._file(index)), int(self.targets[index])
        except DataError as error:
            raise DataError(f"{self._place(index)} cannot be read: {error}") from error

    def problem(self, index: int, /) -> str | None:
        """Returns the record and why its image cannot be decoded, or None if it can."""
        try:
            return validate.problem(self._file(index), self._place(index))
        except DataError as error:
            return f"{self._place(index)}: {error}"

    def identity(self, index: int, /) -> str:
        """Returns the version of the split and the record's position in it."""
        return f"{self.version}[{self.indices[index]}]"

    def take(self, indices: np.ndarray) -> "HfSource":
        """Returns the source of these examples only, with the same classes."""
        return replace(self, indices=self.indices[indices], targets=self.targets[indices])

    def _file(self, index: int) -> bytes | Path:
        try:
            image = self.records[int(self.indices[index])][self.image_key] or {}
        except Exception as error:  # pyarrow and datasets raise many types
            raise DataError(f"its file is damaged ({error})") from error
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        if not image.get("path"):
            raise DataError("the record has no image")
        return Path(image["path"])

    def _place(self, index: int) -> str:
        return f"{self.name}[{self.indices[index]}]"


def find(place: str) -> Collection:
    """Returns the splits of a Hugging Face data set on a disk.

    Args:
      place: a folder of `save_to_disk`, or of parquet files.

    Raises:
      DataError: there is no such folder, `datasets` is missing or cannot read it, or a split has no
        images and class labels.
    """
    root, name = Path(place).expanduser(), f"hf_dataset:{printable(place)}"
    kinds = "a folder of datasets' save_to_disk, or a folder of parquet files"
    if not place or not root.is_dir():
        where = printable(Path.cwd())
        raise DataError(f"{name} is no folder (looked from {where}): give {kinds}.")
    files = sorted(root.rglob("*.parquet"))
    is_saved = (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()
    if not is_saved and not files:
        raise DataError(
            f"{name} holds no dataset_dict.json, state.json or *.parquet: give {kinds}."
        )
    datasets = _import_datasets(name)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they print carriage returns into logs
    try:
        if is_saved:
            files = sorted(root.rglob("*.arrow"))
            loaded = datasets.load_from_disk(str(root))
        else:
            loaded = datasets.load_dataset("parquet", data_dir=str(root.resolve()))
    except Exception as error:  # a damaged file, a full disk, unknown features
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    version = f"{sum(file.stat().st_size for file in files)} bytes"
    return Collection(name, tuple(splits), partial(_read, name, version, splits))


def _import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} needs the package datasets: pip install 'jaxft[hf-datasets]'."
        ) from error
    return datasets


def _read(
    name: str, version: str, loaded: Mapping[str, Any], splits: Sequence[str]
) -> dict[str, HfSource]:
    import datasets

    sources = {}
    for split in splits:
        records = loaded[split]
        image_key, label_key = _find_keys(f"{name} {split}", records.features)
        classes = tuple(map(printable, records.features[label_key].names))
        labels = records.select_columns([label_key]).with_format("arrow")[:][label_key]
        targets = labels.fill_null(-1).to_numpy().astype(np.int32)
        if wrong := np.count_nonzero((targets < 0) | (targets >= len(classes))):
            raise DataError(
                f"{name} {split}: {wrong:,} of {len(targets):,} images have no label (a label is "
                f"one of 0..{len(classes) - 1}): use a split that is labelled."
            )
        images = records.select_columns([image_key])
        sources[split] = HfSource(
            name=f"{name} {split}",
            version=f"{split} {len(targets)} {version}",
            classes=classes,
            records=images.cast_column(image_key, datasets.Image(decode=False)),
            image_key=image_key,
            targets=targets,
            indices=np.arange(len(targets)),
        )
    return sources


def _find_keys(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the names of the image and label columns: the only ones, or `image` and `label`.

    Raises:
      DataError: there is no such pair.
    """
    import datasets

    found = []
    for kind, usual in ((datasets.Image, "image"), (datasets.ClassLabel, "label")):
        keys = [key for key, feature in features.items() if isinstance(feature, kind)]
        found.append([usual] if usual in keys else keys)
    images, labels = found
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    columns = "".join(f"\n  {key}: {type(feature).__name__}" for key, feature in features.items())
    raise DataError(
        f"{name} needs one column of type Image and one of type ClassLabel, but has {len(images)} "
        f"and {len(labels)}. cast_column and class_encode_column of datasets make them, and "
        f"select_columns chooses between several. Its columns:{columns}"
    )
