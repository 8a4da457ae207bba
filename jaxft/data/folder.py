"""Folders of image files, one folder a class: PATH/train/<class>/, PATH/val/<class>/, or no splits.

Hidden files and folders (`.ipynb_checkpoints`, macOS's `._x.jpg`) do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.data import readable
from jaxft.data.decode import decode
from jaxft.data.protocol import Collection
from jaxft.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_VALIDATION = {"val", "valid", "validation"}
_LAYOUT = (
    "images belong in PATH/train/<class>/ and PATH/val/<class>/, or all in PATH/<class>/ to have "
    "a fifth of them validate."
)


@dataclass(frozen=True, eq=False)
class Files:
    """A `Source` of image files that are decoded on access; `targets` int32 [n].

    root: the folder of the split, in which the folders of the classes lie.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    targets: np.ndarray

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
        return readable.problem(self.files[index], str(self.files[index]))

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
            f"{self.files[index]} can no longer be read: {reason}. It was readable when the run "
            "began: bring it back and start the run again."
        )


def find(place: str) -> Collection:
    """The splits of a folder: its folders if one is named `train`, else one split named `train`.

    Raises:
      DataError: there is no such folder, it is empty, or has a split to validate but none to train.
    """
    if not place:
        raise DataError(f"data 'folder:' names no folder: write folder:PATH; {_LAYOUT}")
    root = Path(place).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root} (looked from {Path.cwd()}); {_LAYOUT}")
    folders = _visible_folders(root)
    if not folders:
        raise DataError(f"{root} has no folders, neither of splits nor of classes; {_LAYOUT}")
    if "train" in folders:
        places = {name: root / name for name in folders}
    elif _VALIDATION & set(folders):
        raise DataError(f"{root} has no folder train; its folders: {', '.join(folders)}; {_LAYOUT}")
    else:
        places = {"train": root}
    return Collection(str(root), tuple(places), partial(_read, root, places))


def _read(root: Path, places: dict[str, Path], names: Sequence[str]) -> dict[str, Files]:
    """Lists the images of the splits named, classes and files by name; decodes none.

    Raises:
      DataError: a split has no class folders, a class has no images, or classes differ.
    """
    splits = [places[name] for name in names]
    classes = [_visible_folders(split) for split in splits]
    if bare := [str(split) for split, found in zip(splits, classes, strict=True) if not found]:
        raise DataError(f"no class folders in {' and '.join(bare)}; {_LAYOUT}")
    if any(found != classes[0] for found in classes):
        in_all = set.intersection(*map(set, classes))
        only = [
            f"Only in {name}: {', '.join(c for c in found if c not in in_all) or 'none'}."
            for name, found in zip(names, classes, strict=True)
        ]
        raise DataError(
            f"{root}: {' and '.join(names)} must have the same class folders. {' '.join(only)}"
        )
    images = [[_images(split / name) for name in classes[0]] for split in splits]
    empty = [
        str(split / name)
        for split, per_class in zip(splits, images, strict=True)
        for name, files in zip(classes[0], per_class, strict=True)
        if not files
    ]
    if empty:
        raise DataError(
            f"no images in {', '.join(empty)}. Add some ({' '.join(_SUFFIXES)}) or remove the "
            f"class from {' and from '.join(names)}; {_LAYOUT}"
        )
    return {
        name: Files(
            root=places[name],
            classes=tuple(classes[0]),
            files=tuple(chain.from_iterable(per_class)),
            targets=np.repeat(
                np.arange(len(per_class), dtype=np.int32), [len(files) for files in per_class]
            ),
        )
        for name, per_class in zip(names, images, strict=True)
    }


def _visible_folders(parent: Path) -> list[str]:
    return sorted(
        path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _images(parent: Path) -> list[Path]:
    return sorted(
        path
        for path in parent.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )
