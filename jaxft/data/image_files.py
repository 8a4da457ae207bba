"""Finds image files below a folder, as torchvision's `ImageFolder` does.

A file counts as an image if Pillow can open files of its suffix, in upper or lower case: .jpg,
.png, .tif, .gif, .webp, .avif, .ppm and others. Vector graphics (.eps), video (.mpg) and scientific
formats whose pixels Pillow cannot read (.h5) do not count. Links are followed. Hidden entries and
entries created by file managers (`Thumbs.db`, `desktop.ini`, `__MACOSX`, `@eaDir`) are ignored. All
other files are counted by suffix.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile

from jaxft.data.bucket_folder import BucketPath
from jaxft.errors import DataError

Folder = Path | BucketPath

_IGNORED_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_UNREADABLE_FORMATS = {"EPS", "MPEG"}  # EPS needs Ghostscript; of MPEG Pillow reads no pixels


Entry = os.DirEntry[str] | BucketPath


@dataclass(frozen=True)
class ImageListing:
    """Image files below a folder.

    Attributes:
      folder: the folder.
      images: image files, sorted by folder and name.
      other_files: numbers of all other files by suffix.
      image_folders: names of the direct subfolders with images; empty if the folder itself directly
        contains images.
    """

    folder: Folder
    images: list[Folder]
    other_files: Counter[str]
    image_folders: tuple[str, ...]


def printable(path: str | os.PathLike[str]) -> str:
    r"""Returns a path as one line of valid Unicode with composed letters.

    A byte that is not UTF-8 becomes `\xe9`, a control character such as a line break `\n`.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return unicodedata.normalize("NFC", text)


def image_suffixes() -> frozenset[str]:
    """Returns the lower-case suffixes of the image formats that Pillow can read.

    Includes formats of Pillow plugins that are already registered.
    """
    Image.init()

    def is_readable(image_format: str) -> bool:
        if image_format == "MPO":  # opened by the JPEG plugin
            return True
        if image_format in _UNREADABLE_FORMATS or image_format not in Image.OPEN:
            return False
        factory = Image.OPEN[image_format][0]
        return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))

    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, name in extensions.items() if is_readable(name))


def is_image(name: str, suffixes: frozenset[str]) -> bool:
    """Returns whether a file with this name counts as an image."""
    return os.path.splitext(name)[1].lower() in suffixes


def visible_entries(folder: Folder) -> list[Entry]:
    """Returns a folder's entries in no particular order, without hidden and ignored ones.

    Raises:
      DataError: the folder cannot be listed.
    """
    try:
        entries = _entries(folder)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be listed: {error.strerror}.") from error
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED_NAMES
    ]


def _entries(folder: Folder) -> Sequence[Entry]:
    if isinstance(folder, BucketPath):
        return [*folder.entries.values()]
    with os.scandir(folder) as entries:
        return [*entries]


def is_folder(entry: Entry) -> bool:
    """Returns whether an entry is a folder or a link to one."""
    return not is_broken_link(entry) and entry.is_dir()


def is_broken_link(entry: Entry) -> bool:
    """Returns whether an entry is a link whose target does not exist."""
    return entry.is_symlink() and not os.path.exists(entry)


def list_images(folder: Folder, *, ancestors: tuple[Folder, ...] = ()) -> ImageListing:
    """Lists the images in a folder and all folders below it.

    A folder's files come before the files of its subfolders; both are sorted by name. Broken links
    are listed as images, so that reading them raises an error with their path.

    Args:
      folder: the folder to search.
      ancestors: folders above it. Links to these, or to folders on the path from `folder` to the
        link, are not followed.
    """
    suffixes = image_suffixes()
    images, other_files, image_folders = list[Folder](), Counter[str](), set()
    files = _walk(folder, "", frozenset(map(_file_id, ancestors)))
    for relative_folder, name, entry in sorted(files, key=lambda file: file[:2]):
        suffix = os.path.splitext(name)[1].lower()
        if is_broken_link(entry) or (suffix in suffixes and entry.is_file()):
            images.append(entry if isinstance(entry, BucketPath) else Path(entry.path))
            image_folders.add(relative_folder.split("/")[1] if relative_folder else "")
        else:
            other_files[suffix or "without a suffix"] += 1
    has_loose_images = "" in image_folders
    names = () if has_loose_images else tuple(sorted(image_folders))
    return ImageListing(folder, images, other_files, names)


def _walk(
    folder: Folder, relative_folder: str, ancestors: frozenset[Hashable]
) -> Iterator[tuple[str, str, Entry]]:
    """Yields (relative folder, printable name, entry) of all files below a folder."""
    ancestors |= {_file_id(folder)}
    for entry in visible_entries(folder):
        path, name = folder / entry.name, printable(entry.name)
        if not is_folder(entry):
            yield relative_folder, name, entry
        elif not (entry.is_symlink() and _file_id(path) in ancestors):
            yield from _walk(path, f"{relative_folder}/{name}", ancestors)


def _file_id(folder: Folder) -> Hashable:
    if isinstance(folder, BucketPath):
        return folder
    status = folder.stat()
    return status.st_dev, status.st_ino
