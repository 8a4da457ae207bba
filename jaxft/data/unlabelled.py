"""Finds and reads image files without labels."""

import difflib
import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.data.decode import decode
from jaxft.data.image_files import list_images, printable
from jaxft.data.validate import OnBadImage
from jaxft.errors import DataError


def find_images(places: Iterable[str | PathLike[str]]) -> tuple[Path, ...]:
    """Returns the image files at some places, in the order of the places.

    Args:
      places: files, which may have any suffix; folders, for all images below them, sorted; or
        patterns such as `photos/**/*.jpg`, in which `**` covers any number of folders.

    Raises:
      DataError: a place does not exist, or contains no images.
    """
    found = [path for place in places for path in _images_at(os.fspath(place))]
    return tuple(dict.fromkeys(found))


def _images_at(place: str) -> Iterator[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        images = list_images(path).images
        if not images:
            raise DataError(f"there are no images in {printable(path)} or in folders below it.")
        yield from map(Path, images)  # on a disk
    elif path.exists():
        yield path
    elif glob.has_magic(place):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise DataError(f"no file matches {printable(place)} (looked from {Path.cwd()}).")
        yield from files
    else:
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {printable(path.with_name(close[0]))}?" if close else ""
        raise DataError(f"there is no {printable(path)} (looked from {Path.cwd()}).{hint}")


@dataclass(frozen=True)
class UnlabelledFiles:
    """A `Source` of image files whose targets are all 0.

    Attributes:
      files: the image files.
      side: height and width in pixels of the black image that replaces an unreadable one.
      on_bad_image: "error" raises an error for an unreadable image; "skip" replaces it.
      problems: why an image cannot be read, by index; filled while images are read.
    """

    files: tuple[Path, ...]
    side: int
    on_bad_image: OnBadImage = "error"
    problems: dict[int, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ("unlabelled",)

    @property
    def targets(self) -> np.ndarray:
        """Zeros, int32 [n]."""
        return np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """Returns the RGB image and 0.

        Raises:
          DataError: the image is unreadable, and `on_bad_image` is "error".
        """
        try:
            return decode(self.files[index]), 0
        except DataError as error:
            if self.on_bad_image == "error":
                raise DataError(f"{printable(self.files[index])}: {error}") from error
            self.problems[index] = str(error)
            return Image.new("RGB", (self.side, self.side)), 0
