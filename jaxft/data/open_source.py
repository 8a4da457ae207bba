"""Opens a data spec such as `folder:PATH`, or a source, as the train and validation splits."""

import difflib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from jaxft.data import csv_listing, digits, folder, hf_dataset, tfds, webdataset
from jaxft.data.bucket_folder import SCHEME
from jaxft.data.select_splits import select
from jaxft.data.source import Collection, Source, Splits
from jaxft.data.validate import Divide, OnBadImage, check_images
from jaxft.errors import DataError

__all__ = ["Source", "Splits", "open_collection", "open_source"]

_KINDS: dict[str, tuple[Callable[[str], Collection], str]] = {
    "digits": (digits.find, "digits, or some of them: digits:5-9"),
    "folder": (folder.find, "folder:PATH with PATH/train/<class>/ and PATH/val/<class>/, or with "
               "PATH/<class>/"),
    "csv": (csv_listing.find, "csv:FILE with the columns path, label and perhaps split"),
    "tfds": (tfds.find, "tfds:NAME, a set of TensorFlow Datasets such as tfds:oxford_flowers102"),
    "tfds_dir": (tfds.find_prepared, "tfds_dir:PATH, a folder that TFDS prepared as array_record"),
    "hf_dataset": (hf_dataset.find, "hf_dataset:PATH, a folder of datasets' save_to_disk or of "
                   "parquet files"),
    "webdataset": (webdataset.find, "webdataset:PATH/shard-{000..012}.tar, or a folder of shards"),
}  # fmt: skip


def open_source(
    spec: str | Source | Splits,
    *,
    split_by: str | None = None,
    train: str | None = None,
    val: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    sample_above: int | None = None,
    divide: Divide | None = None,
) -> Splits:
    """Opens a data set, selects the splits of a run, and checks that their images are readable.

    A spec is one of:

    - `digits`, `digits:5-9`, `digits:3`: scikit-learn's 8x8 digits, all or some of the classes.
    - `folder:PATH`: image files in PATH/train/<class>/, PATH/val/<class>/ and splits of other
      names; or in PATH/<class>/, as one split named train. Images may lie in folders below the
      class folder; see `jaxft.data.image_files` for the image formats. PATH may be gs://BUCKET/...
    - `csv:FILE`: image files that a CSV file lists, see `jaxft.data.csv_listing`.
    - `tfds:NAME`: an image classification set of TensorFlow Datasets, in TFDS_DATA_DIR or
      ~/tensorflow_datasets; downloaded and prepared if necessary.
    - `tfds_dir:PATH`: a folder that TFDS prepared in array_record format.
    - `hf_dataset:PATH`: a Hugging Face data set, saved with `save_to_disk` or as parquet files.
    - `webdataset:PATTERN`: WebDataset shards, see `jaxft.data.webdataset`.
    - a `Source`, such as `arrays(...)`, as one split named train; or a `Splits`.

    Args:
      spec: the data set.
      split_by: CSV file with the columns path and split, which assigns image files to splits.
      train: split expression (`jaxft.data.split_expressions`) of the training images, such as
        `train[:80%]`, `train+test` or `train[10/class]`. By default the split train, or the only
        split.
      val: split expression of the validation images. By default the split val, validation or
        valid. If there is none, the images of the training splits that `train` and `shots` leave
        out; if they leave out none, a random 20 % of each class.
      shots: train on this many images of each class only.
      seed: determines all random selections. With the same seed, fewer shots are a subset of more.
      on_bad_image: "error" raises an error for unreadable images, "skip" leaves them out and lists
        them in the remarks.
      sample_above: check a sample if all decoded images take more than this number of bytes; with
        "error" only. None: check all.
      divide: divides the check among the processes of a run (`jaxft.data.validate`).

    Raises:
      DataError: the spec is wrong, or the data is missing, incomplete or unreadable.
    """
    if shots is not None and shots < 1:
        raise DataError(f"shots={shots}: give at least 1 image per class, or None to use them all.")
    splits = select(open_collection(spec, split_by), train=train, val=val, shots=shots, seed=seed)
    sources = {"train": splits.train, "val": splits.val}
    readable, remarks = check_images(sources, on_bad_image, divide, sample_above=sample_above)
    return Splits(readable["train"], readable["val"], (*splits.remarks, *remarks))


def open_collection(spec: str | Source | Splits, split_by: str | None = None) -> Collection:
    """Returns all splits of a data set; `open_source` selects among them.

    Args:
      spec: the data set.
      split_by: as in `open_source`.

    Raises:
      DataError: the spec is wrong, or there is no such data.
    """
    collection = _open(spec)
    return collection if split_by is None else csv_listing.split_by(collection, split_by)


def _open(spec: str | Source | Splits) -> Collection:
    if isinstance(spec, Splits):
        sources = {"train": spec.train, "val": spec.val}
        for name, source in sources.items():
            _check_source(f"data.{name}", source)
        return Collection("the data given", tuple(sources), lambda _: sources)
    if isinstance(spec, PathLike):
        spec = os.fsdecode(spec)
    if not isinstance(spec, str):
        _check_source("data", spec)
        return Collection("the data given", ("train",), lambda _: {"train": spec})
    kind, colon, place = spec.partition(":")
    if kind in _KINDS:
        find, _ = _KINDS[kind]
        return find("0-9" if spec == "digits" else place)

    similar = difflib.get_close_matches(kind.lower(), _KINDS, n=1)
    if spec.startswith(SCHEME) or (spec and Path(spec).is_dir()):
        hint = f" Did you mean 'folder:{spec}'?"
    elif spec.endswith(".csv"):
        hint = f" Did you mean 'csv:{spec}'?"
    else:
        hint = f" Did you mean '{similar[0]}{colon}{place}'?" if similar else ""
    kinds = "".join(f"\n  {usage}" for _, usage in _KINDS.values())
    raise DataError(f"unknown data '{spec}'.{hint} Data is one of:{kinds}")


def _check_source(name: str, source: Any) -> None:
    """Raises DataError for an object that is no `Source`, such as a pair of arrays."""
    required = ("classes", "targets", "__len__", "__getitem__")
    missing = [attribute for attribute in required if not hasattr(source, attribute)]
    if not missing and hasattr(source.targets, "dtype"):
        return
    reason = f"has no {missing[0]}" if missing else "has targets that are no array"
    raise DataError(
        f"{name} is a {type(source).__name__}, which {reason}. Give a spec such as 'folder:PATH', "
        "jaxft.data.arrays(images, targets, classes), or Splits of two such sources."
    )
