"""Folders of image files, one folder a class: PATH/train/<class>/, PATH/val/<class>/, or no splits.

See `jaxft.data.image_files` for the files that count, `jaxft.data.folder_layout` for the folders.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.decode import decode
from jaxft.data.folder_layout import (
    EXPECTED,
    check_depth,
    check_names,
    images_beside,
    names_a_split,
    splits_of,
    subfolders,
)
from jaxft.data.image_files import Listing, images_below, printable
from jaxft.data.source import Collection
from jaxft.data.split_expressions import shown
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class Files:
    """A `Source` of image files that are decoded on access; `targets` int32 [n].

    root: the folder of the split, in which the folders of the classes lie.
    remarks: what of the split is left out, a sentence each.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    targets: np.ndarray
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target; a DataError if the file has become unreadable."""
        try:
            return decode(self.files[index]), int(self.targets[index])
        except DataError as error:
            raise self._lost(index, error) from error

    def problem(self, index: int, /) -> str | None:
        """The file and why it cannot be decoded, or None if it can."""
        path = self.files[index]
        problem = validate.problem(path, printable(path))
        if problem and path.is_symlink():
            problem += f" (a link to {printable(path.readlink())})"
        return problem

    def identity(self, index: int, /) -> str:
        """Returns the file's path below `root`, and its size in bytes."""
        path = self.files[index]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._lost(index, error.strerror) from error
        return f"{path.relative_to(self.root).as_posix()}\0{size}"

    def take(self, indices: np.ndarray) -> "Files":
        """The source of these examples only, with the same classes."""
        return replace(
            self, files=tuple(self.files[i] for i in indices), targets=self.targets[indices]
        )

    def _lost(self, index: int, reason: object) -> DataError:
        return DataError(
            f"{printable(self.files[index])} can no longer be read: {reason}. It was readable when "
            "the run began: bring it back and start the run again."
        )


def find(place: str) -> Collection:
    """The splits of a folder: its folders if one is a split, else one split named `train`.

    Raises:
      DataError: there is no such folder, it is empty, or has a split to validate but none to train.
    """
    if not place:
        raise DataError(f"data 'folder:' names no folder: write folder:PATH; {EXPECTED}")
    root = Path(place).expanduser()
    if root.exists() and not root.is_dir():
        raise DataError(f"{printable(root)} is a file, not a folder; {EXPECTED}")
    if not root.is_dir():
        looked = f"(looked from {printable(Path.cwd())})"
        raise DataError(f"there is no folder {printable(root)} {looked}; {EXPECTED}")
    places = splits_of(root)
    return Collection(printable(root), tuple(places), partial(_read, root, places))


def class_folders_of(place: str) -> list[Path]:
    """Returns the folders whose folders are classes: those of the splits, or the root itself.

    There are none where there is no such folder.
    """
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        return []
    return [path for name, path in splits_of(root).items() if path == root or names_a_split(name)]


def _read(root: Path, places: dict[str, Path], names: Sequence[str]) -> dict[str, Files]:
    """Lists the images of the splits named, classes and files by name; decodes none.

    Raises:
      DataError: a split has no class folders, a class has no images, or classes differ.
    """
    folders = {name: subfolders(places[name]) for name in names}
    check_names(root, folders)
    listings = {
        name: {
            label: images_below(folder, within=(root, places[name]))
            for label, folder in of_split.items()
        }
        for name, of_split in folders.items()
    }
    for name, of_split in listings.items():
        check_depth(places[name], of_split)
    empty = [
        printable(folders[name][label]) + (f" ({_kinds(listing.others)})" if listing.others else "")
        for name, of_split in listings.items()
        for label, listing in of_split.items()
        if not listing.images
    ]
    if empty:
        raise DataError(
            f"no images in {', '.join(empty)}. Add some (.jpg, .png or another kind that Pillow "
            f"reads) or remove the class from {' and from '.join(names)}; {EXPECTED}"
        )
    found = {name: _files(name, places[name], of_split) for name, of_split in listings.items()}
    if root not in places.values() and (beside := images_beside(root)):
        first = found[names[0]]
        remark = f"{printable(root)}: {_left_out(beside, 'folders of the splits')}"
        found[names[0]] = replace(first, remarks=(*first.remarks, remark))
    return found


def _files(name: str, root: Path, listings: Mapping[str, Listing]) -> Files:
    counts = [len(listing.images) for listing in listings.values()]
    others = sum((listing.others for listing in listings.values()), Counter[str]())
    remarks = []
    if others:
        what = "files are not images" if others.total() > 1 else "file is not an image"
        left_out = "are left out" if others.total() > 1 else "is left out"
        remarks.append(
            f"{name}: {others.total():,} {what} that can be read here and {left_out}: "
            f"{_kinds(others)}."
        )
    if beside := images_beside(root):
        remarks.append(f"{name}: {_left_out(beside, 'class folders')}")
    return Files(
        root=root,
        classes=tuple(listings),
        files=tuple(chain.from_iterable(listing.images for listing in listings.values())),
        targets=np.repeat(np.arange(len(listings), dtype=np.int32), counts),
        remarks=tuple(remarks),
    )


def _left_out(images: list[str], folders: str) -> str:
    what = "images lie" if len(images) > 1 else "image lies"
    left_out = "are left out" if len(images) > 1 else "is left out"
    return (
        f"{len(images):,} {what} beside the {folders}, in none of them, and {left_out}: "
        f"{shown(images)}."
    )


def _kinds(others: Counter[str]) -> str:
    return ", ".join(f"{printable(suffix)} ({count:,})" for suffix, count in others.most_common())
