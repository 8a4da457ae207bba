"""How a spec such as `folder:PATH`, or a source itself, becomes the two splits of a run."""

import difflib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from jaxft.data import digits, folder, tfds
from jaxft.data.select_splits import select
from jaxft.data.source import Collection, Source, Splits
from jaxft.data.validate import OnBadImage, checked
from jaxft.errors import DataError

__all__ = ["Source", "Splits", "open_collection", "open_source"]

_KINDS: dict[str, tuple[Callable[[str], Collection], str]] = {
    "digits": (digits.find, "digits, or some of them: digits:5-9"),
    "folder": (folder.find, "folder:PATH with PATH/train/<class>/ and PATH/val/<class>/, or with "
               "PATH/<class>/"),
    "tfds": (tfds.find, "tfds:NAME, a set of TensorFlow Datasets such as tfds:oxford_flowers102"),
    "tfds_dir": (tfds.find_prepared, "tfds_dir:PATH, a folder that TFDS prepared as array_record"),
}  # fmt: skip


def open_source(
    spec: str | Source | Splits,
    *,
    train: str | None = None,
    val: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
) -> Splits:
    """Opens the data that `spec` names and checks all of it, so that a run cannot die of it later.

    - `digits`, `digits:5-9`, `digits:3`: scikit-learn's 8x8 digits, those classes only.
    - `folder:PATH`: image files in PATH/train/<class>/, PATH/val/<class>/ and other splits of any
      name; or in PATH/<class>/, which is one split named train. All kinds count that Pillow reads,
      also in folders below that of their class; see `jaxft.data.image_files`.
    - `tfds:NAME`: an image classification set of TensorFlow Datasets, in TFDS_DATA_DIR or
      ~/tensorflow_datasets; downloaded and prepared there if it is not yet.
    - `tfds_dir:PATH`: a folder that TFDS prepared, in array_record format.
    - a `Source`, such as `arrays(...)`: one split named train; or a `Splits` with train and val.

    `train` and `val` are split expressions (`jaxft.data.split_expressions`): `train[:80%]`,
    `train+test`, `train[10/class]`. Without them the split train trains (or the only one there
    is), and val, validation or valid validates. If `shots` is given, training uses that many
    images of each class.

    Without a validation split, what train leaves of its splits validates (`shots` and slices
    leave some); if it leaves nothing, then 20 % of each class. All choices depend on `seed`
    alone, and with one seed fewer shots are a subset of more.

    Raises:
      DataError: the spec is wrong, or the data missing, incomplete or (unless `on_bad_image` is
        "skip", which leaves out such images with a remark) unreadable.
    """
    if shots is not None and shots < 1:
        raise DataError(f"shots={shots}: give at least 1 image per class, or None to use them all.")
    splits = select(open_collection(spec), train=train, val=val, shots=shots, seed=seed)
    good, remarks = checked({"train": splits.train, "val": splits.val}, on_bad_image)
    return Splits(good["train"], good["val"], (*splits.remarks, *remarks))


def open_collection(spec: str | Source | Splits) -> Collection:
    """All the splits that `spec` has by itself; `open_source` chooses among them.

    Raises:
      DataError: the spec is wrong, or there is no such data.
    """
    if isinstance(spec, Splits):
        both = {"train": spec.train, "val": spec.val}
        for name, source in both.items():
            _check_source(f"data.{name}", source)
        return Collection("the data given", tuple(both), lambda _: both)
    if isinstance(spec, PathLike):
        spec = os.fsdecode(spec)
    if not isinstance(spec, str):
        _check_source("data", spec)
        return Collection("the data given", ("train",), lambda _: {"train": spec})
    kind, colon, place = spec.partition(":")
    if kind in _KINDS:
        return _KINDS[kind][0]("0-9" if spec == "digits" else place)

    near = difflib.get_close_matches(kind.lower(), _KINDS, n=1)
    if spec and Path(spec).is_dir():
        guess = f" Did you mean 'folder:{spec}'?"
    else:
        guess = f" Did you mean '{near[0]}{colon}{place}'?" if near else ""
    kinds = "".join(f"\n  {usage}" for _, usage in _KINDS.values())
    raise DataError(f"unknown data '{spec}'.{guess} Data is one of:{kinds}")


def _check_source(name: str, source: Any) -> None:
    """Raises DataError for what is no `Source`, such as a pair of arrays or an `ImageFolder`."""
    wanted = ("classes", "targets", "__len__", "__getitem__")
    missing = [attribute for attribute in wanted if not hasattr(source, attribute)]
    if not missing and hasattr(source.targets, "dtype"):
        return
    lacks = f"has no {missing[0]}" if missing else "has targets that are no array"
    raise DataError(
        f"{name} is a {type(source).__name__}, which {lacks}. Give a spec such as 'folder:PATH', "
        "jaxft.data.arrays(images, targets, classes), or Splits of two such sources."
    )
