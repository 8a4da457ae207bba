"""Folders of image files, one folder a class: PATH/train/<class>/ and PATH/val/<class>/."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxft.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_SHOWN = 5  # files named in one message


@dataclass(frozen=True, eq=False)
class Files:
    """A `Source` of image files that are decoded on access; `targets` int32 [n]."""

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target; a DataError if the file has become unreadable."""
        path = self.files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), int(self.targets[index])
        except Exception as error:  # decoders raise anything, from OSError to struct.error
            raise DataError(
                f"{path} can no longer be read: {_reason(error)}. It was readable when the run "
                "began: bring it back and start the run again."
            ) from error

    def take(self, indices: np.ndarray) -> "Files":
        """The source of these examples only, with the same classes."""
        return replace(
            self, files=tuple(self.files[i] for i in indices), targets=self.targets[indices]
        )


def read(place: str) -> tuple[Files, Files]:
    """Lists the images of `place`/train and `place`/val, classes and files by name; decodes none.

    Hidden files and folders (`.ipynb_checkpoints`, macOS's `._x.jpg`) do not count.

    Raises:
      DataError: a folder is missing or empty, or train and val have different classes.
    """
    layout = "images belong in PATH/train/<class>/ and PATH/val/<class>/."
    if not place:
        raise DataError(f"data 'folder:' names no folder: write folder:PATH; {layout}")
    root = Path(place).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root} (looked from {Path.cwd()}); {layout}")
    splits = (root / "train", root / "val")
    if missing := [split.name for split in splits if not split.is_dir()]:
        raise DataError(
            f"{root} has no folder {' and no folder '.join(missing)}; "
            f"its folders: {', '.join(_visible_folders(root)) or 'none'}; {layout}"
        )
    in_train, in_val = classes = [_visible_folders(split) for split in splits]
    if bare := [str(split) for split, names in zip(splits, classes, strict=True) if not names]:
        raise DataError(f"no class folders in {' and '.join(bare)}; {layout}")
    if in_train != in_val:
        only_train = [name for name in in_train if name not in in_val] or ["none"]
        only_val = [name for name in in_val if name not in in_train] or ["none"]
        raise DataError(
            f"{root}: train and val must have the same class folders. "
            f"Only in train: {', '.join(only_train)}. Only in val: {', '.join(only_val)}."
        )
    found = [[_images(split / name) for name in in_train] for split in splits]
    empty = [
        str(split / name)
        for split, images in zip(splits, found, strict=True)
        for name, files in zip(in_train, images, strict=True)
        if not files
    ]
    if empty:
        raise DataError(
            f"no images in {', '.join(empty)}. Add some ({' '.join(_SUFFIXES)}) or remove the "
            "class from train and from val."
        )
    train, val = (
        Files(
            classes=tuple(in_train),
            files=tuple(chain.from_iterable(images)),
            targets=np.repeat(np.arange(len(images), dtype=np.int32), [len(f) for f in images]),
        )
        for images in found
    )
    return train, val


def check_readable(files: Sequence[Path]) -> None:
    """Decodes every file once, JPEGs at an eighth of their size, which reads all their bytes.

    Raises:
      DataError: some cannot be decoded, or are too large to be safe; the first few are named.
    """
    # One task a thread, each with a slice of the files: a future a file would cost more than
    # the list of files itself.
    threads = min(32, (os.cpu_count() or 1) + 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Pillow only warns of images above its first limit. The filter is set here, around all
        # threads, because filters belong to the process.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        found = pool.map(_problems, [files[k::threads] for k in range(threads)])
        problems = sorted(line for lines in found for line in lines)
    if problems:
        shown = "".join(f"\n  {line}" for line in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{len(problems)} of {len(files)} images cannot be read; replace or remove them:"
            f"{shown}{more}"
        )


def _problems(files: Sequence[Path]) -> list[str]:
    problems = []
    for path in files:
        try:
            with Image.open(path) as image:
                image.draft(None, (1, 1))
                image.convert("RGB")
        except Exception as error:  # decoders raise anything, from OSError to struct.error
            problems.append(f"{path}: {_reason(error)}")
    return problems


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    # An OSError's own text repeats the path.
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


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
