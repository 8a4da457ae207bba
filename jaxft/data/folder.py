"""Folders of image files: PATH/train/<class>/ and PATH/val/<class>/, or PATH/<class>/.

PATH is on a disk, or `gs://BUCKET/...`.

`jaxft.data.image_files` finds the images, `jaxft.data.folder_layout` the splits and classes.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.bucket_folder import SCHEME, BucketPath, content, list_folder
from jaxft.data.class_names import join_names
from jaxft.data.decode import decode
from jaxft.data.folder_layout import (
    EXPECTED,
    check_class_folders,
    check_same_classes,
    find_splits,
    is_split_name,
    loose_images,
    subfolders,
)
from jaxft.data.image_files import Folder, ImageListing, list_images, printable
from jaxft.data.source import Collection
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class FolderSource:
    """A `Source` of image files, decoded on access.

    Attributes:
      root: the folder that holds the class folders.
      classes: class names.
      files: image files, sorted by class.
      targets: int32 [n].
      remarks: sentences for the user about files that are left out.
    """

    root: Folder
    classes: tuple[str, ...]
    files: tuple[Folder, ...]
    targets: np.ndarray
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """Returns the RGB image and its target.

        Raises:
          DataError: the file cannot be read.
        """
        try:
            return decode(content(self.files[index])), int(self.targets[index])
        except DataError as error:
            raise self._unreadable(index, error) from error

    def problem(self, index: int, /) -> str | None:
        """Returns the file and why it cannot be decoded, or None if it can."""
        path = self.files[index]
        try:
            problem = validate.problem(content(path), printable(path))
        except DataError as error:
            return f"{printable(path)}: {error}"
        if problem and path.is_symlink():
            problem += f" (a link to {printable(os.readlink(path))})"
        return problem

    def identity(self, index: int, /) -> str:
        """Returns the file's path below `root` and its size in bytes."""
        path = self.files[index]
        try:
            size = path.size if isinstance(path, BucketPath) else path.stat().st_size
        except OSError as error:
            raise self._unreadable(index, error.strerror) from error
        return f"{PurePosixPath(path).relative_to(self.root)}\0{size}"

    def take(self, indices: np.ndarray) -> "FolderSource":
        """Returns the source of these examples only, with the same classes."""
        return replace(
            self, files=tuple(self.files[i] for i in indices), targets=self.targets[indices]
        )

    def _unreadable(self, index: int, reason: object) -> DataError:
        return DataError(
            f"{printable(self.files[index])} cannot be read: {reason}. Restore it, or start a new "
            "run without it; check='all' (--check all) lists all such images before a run."
        )


def find(place: str) -> Collection:
    """Returns the splits of a folder; without split folders, one split named `train`.

    Raises:
      DataError: the folder is missing or empty, or has validation splits but no training split.
    """
    if not place:
        raise DataError(f"data 'folder:' names no folder: write folder:PATH; {EXPECTED}")
    in_bucket = place.startswith(SCHEME)
    root = list_folder(place) if in_bucket else Path(place).expanduser()
    if isinstance(root, Path) and root.exists() and not root.is_dir():
        raise DataError(f"{printable(root)} is a file, not a folder; {EXPECTED}")
    if not root.is_dir():
        where = "" if in_bucket else f" (looked from {printable(Path.cwd())})"
        raise DataError(f"there is no folder {printable(root)}{where}; {EXPECTED}")
    split_folders = find_splits(root)
    read = partial(_read, root, split_folders)
    return Collection(printable(root), tuple(split_folders), read)


def class_roots(place: str) -> list[Path]:
    """Returns the folders on a disk that directly hold class folders: the splits, or the data set.

    Returns an empty list if there is no such folder.
    """
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        return []
    folders = find_splits(root).items()
    return [Path(path) for name, path in folders if path == root or is_split_name(name)]


def _read(
    root: Folder, split_folders: dict[str, Folder], splits: Sequence[str]
) -> dict[str, FolderSource]:
    """Lists the images of the named splits, sorted by class and file name.

    Raises:
      DataError: a split has no class folders, a class has no images, or classes differ.
    """
    class_folders = {split: subfolders(split_folders[split]) for split in splits}
    check_same_classes(root, class_folders)
    listings = {
        split: {
            name: list_images(folder, ancestors=(root, split_folders[split]))
            for name, folder in folders.items()
        }
        for split, folders in class_folders.items()
    }
    for split, by_class in listings.items():
        check_class_folders(split_folders[split], by_class)
    _check_not_empty(listings)
    sources = {
        split: _source(split, split_folders[split], by_class)
        for split, by_class in listings.items()
    }
    has_split_folders = root not in split_folders.values()
    if has_split_folders and (loose := loose_images(root)):
        first = sources[splits[0]]
        remark = f"{printable(root)}: {_loose_images_remark(loose, 'folders of the splits')}"
        sources[splits[0]] = replace(first, remarks=(*first.remarks, remark))
    return sources


def _check_not_empty(listings: Mapping[str, Mapping[str, ImageListing]]) -> None:
    empty = []
    for by_class in listings.values():
        for listing in by_class.values():
            if not listing.images:
                others = listing.other_files
                suffix = f" ({_count_suffixes(others)})" if others else ""
                empty.append(f"{printable(listing.folder)}{suffix}")
    if empty:
        raise DataError(
            f"no images in {', '.join(empty)}. Add some (.jpg, .png or another kind that Pillow "
            f"reads) or remove the class from {' and from '.join(listings)}; {EXPECTED}"
        )


def _source(split: str, root: Folder, listings: Mapping[str, ImageListing]) -> FolderSource:
    counts = [len(listing.images) for listing in listings.values()]
    other_files = sum((listing.other_files for listing in listings.values()), Counter[str]())
    remarks = []
    if total := other_files.total():
        subject = "files are not images" if total > 1 else "file is not an image"
        verb = "are left out" if total > 1 else "is left out"
        remarks.append(
            f"{split}: {total:,} {subject} that can be read here and {verb}: "
            f"{_count_suffixes(other_files)}."
        )
    if loose := loose_images(root):
        remarks.append(f"{split}: {_loose_images_remark(loose, 'class folders')}")
    return FolderSource(
        root=root,
        classes=tuple(listings),
        files=tuple(chain.from_iterable(listing.images for listing in listings.values())),
        targets=np.repeat(np.arange(len(listings), dtype=np.int32), counts),
        remarks=tuple(remarks),
    )


def _loose_images_remark(images: list[str], folders: str) -> str:
    subject = "images lie" if len(images) > 1 else "image lies"
    verb = "are left out" if len(images) > 1 else "is left out"
    return f"{len(images):,} {subject} outside of the {folders} and {verb}: {join_names(images)}."


def _count_suffixes(files: Counter[str]) -> str:
    return ", ".join(f"{printable(suffix)} ({count:,})" for suffix, count in files.most_common())
