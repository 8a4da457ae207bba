"""Images that a CSV file lists, with their classes; and splits of image files by a CSV file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from jaxft.data.bucket_folder import BucketPath
from jaxft.data.class_names import sorted_classes
from jaxft.data.csv_table import read_table
from jaxft.data.folder import FolderSource
from jaxft.data.image_files import printable
from jaxft.data.source import Collection
from jaxft.errors import DataError


def find(place: str) -> Collection:
    """Returns the images that a CSV file lists, in its order.

    Its columns are `path`, `label` and perhaps `split`; without the last, there is one split named
    train. The classes are the labels, sorted by name, or by value if all are integers.

    Raises:
      DataError: the file is missing or wrong, or an image file is missing.
    """
    table = read_table("csv:", place, ("path", "label"), "split")
    files = table.image_files()
    labels = [printable(label) for label in table.columns["label"]]
    classes = sorted_classes(labels)
    number = {name: k for k, name in enumerate(classes)}
    source = FolderSource(
        root=Path(os.path.commonpath([file.parent for file in files])),
        classes=classes,
        files=tuple(files),
        targets=np.array([number[label] for label in labels], np.int32),
    )
    by_split = _rows_by_split(table.columns.get("split", ["train"] * len(files)))
    return Collection(printable(table.file), tuple(by_split), partial(_read, source, by_split))


def split_by(collection: Collection, place: str) -> Collection:
    """Returns the images of a collection in the splits that a CSV file assigns them to.

    The file has the columns `path` and `split`. Images that it does not list are left out.

    Raises:
      DataError: the file is missing or wrong, or names files that are not in the collection; or the
        collection does not consist of image files on a disk.
    """
    table = read_table("split_by=", place, ("path", "split"))
    sources = list(collection.read(collection.splits).values())
    folders = [source for source in sources if isinstance(source, FolderSource)]
    listed = list(chain.from_iterable(source.files for source in folders))
    if len(folders) < len(sources) or any(isinstance(file, BucketPath) for file in listed):
        raise DataError(
            f"split_by={place}: {collection.name} does not consist of image files on a disk, which "
            "alone have paths; select its splits with train_split and val_split."
        )
    absolute = [printable(os.path.abspath(file)) for file in listed]
    index = {path: k for k, path in enumerate(absolute)}
    rows = [index.get(printable(file)) for file in table.image_files()]
    table.raise_problems(
        f"lists files that are no images of {collection.name}",
        ["" if k is not None else v for k, v in zip(rows, table.columns["path"], strict=True)],
    )
    remarks = [text for source in folders for text in source.remarks]
    if left_out := len(listed) - len(rows):
        remarks.append(f"{left_out:,} of {len(listed):,} images are left out: {place} lacks them.")
    whole = FolderSource(
        root=Path(os.path.commonpath([source.root for source in folders])),
        classes=folders[0].classes,
        files=tuple(listed),
        targets=np.concatenate([source.targets for source in folders]),
        remarks=tuple(remarks),
    ).take(np.array(rows))
    by_split = _rows_by_split(table.columns["split"])
    return Collection(collection.name, tuple(by_split), partial(_read, whole, by_split))


def _rows_by_split(names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the rows of each split, in the order in which the splits appear."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _read(
    source: FolderSource, by_split: Mapping[str, Sequence[int]], splits: Sequence[str]
) -> dict[str, FolderSource]:
    """Returns the named splits; the first has the remarks."""
    return {
        name: replace(
            source.take(np.array(by_split[name])), remarks=source.remarks if not position else ()
        )
        for position, name in enumerate(splits)
    }
