"""Image files below a folder, as torchvision's `ImageFolder` finds them, and what is not one.

A file counts as an image if Pillow can open files of its suffix, in any case: .jpg, .png, .tif,
.gif, .webp, .avif, .ppm and so on. Vector graphics (.eps), video (.mpg) and scientific data of
which Pillow reads the header only (.h5) do not count. Links to files and folders are followed.
Hidden files and folders do not count, nor do the companions of file managers (`Thumbs.db`,
`desktop.ini`, `__MACOSX`, `@eaDir`); all other files are counted by suffix.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile

from jaxft.errors import DataError

_COMPANIONS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
_NOT_READ = {"EPS", "MPEG"}  # a program of its own draws the former; of the latter no image is read


@dataclass(frozen=True)
class Listing:
    """Image files below a folder.

    folder: that folder.
    images: in a fixed order.
    others: the numbers of all other files by suffix.
    folders: the names of the folders directly below that hold images, if none lies beside them.
    """

    folder: Path
    images: list[Path]
    others: Counter[str]
    folders: tuple[str, ...]


def printable(path: str | os.PathLike[str]) -> str:
    """Returns a path or a name with composed letters, on one line.

    A byte that is not UTF-8 becomes `\\xe9`, a control character such as a line break `\\n`.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return unicodedata.normalize("NFC", text)


def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, in small letters, of the files that Pillow can read here as images.

    Plugins that are registered with Pillow by now count.
    """
    Image.init()

    def is_read(kind: str) -> bool:
        if kind == "MPO":  # opened as the JPEG file that it begins with
            return True
        if kind in _NOT_READ or kind not in Image.OPEN:
            return False
        factory = Image.OPEN[kind][0]
        return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))

    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if is_read(kind)
    )


def is_image(name: str, suffixes: frozenset[str]) -> bool:
    """Returns whether a file of that name counts as an image."""
    return os.path.splitext(name)[1].lower() in suffixes


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what a folder holds, in no particular order, but for what is hidden or a companion.

    Raises:
      DataError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return [
                entry
                for entry in found
                if not entry.name.startswith(".") and entry.name.lower() not in _COMPANIONS
            ]
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be listed: {error.strerror}.") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry of a folder is a folder, or a link to one."""
    return not is_dead(entry) and entry.is_dir()


def is_dead(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry of a folder is a link that leads nowhere."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def images_below(folder: Path, *, within: tuple[Path, ...] = ()) -> Listing:
    """Lists the images in a folder and, recursively, in its folders: files first, all by name.

    A link back to a folder on the way down, or to one of `within`, is not followed again. A link
    that leads nowhere is listed with the images, so that it is named by whoever reads them.
    """
    suffixes = image_suffixes()
    images, others, places = [], Counter[str](), set()
    found = _walk(folder, "", frozenset(map(_inode, within)))
    for below, name, entry in sorted(found, key=lambda each: each[:2]):
        suffix = os.path.splitext(name)[1].lower()
        if is_dead(entry) or (suffix in suffixes and entry.is_file()):
            images.append(Path(entry.path))
            places.add(below.split("/")[1] if below else "")
        else:
            others[suffix or "without a suffix"] += 1
    return Listing(folder, images, others, () if "" in places else tuple(sorted(places)))


def _walk(
    folder: Path, below: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
    above |= {_inode(folder)}
    for entry in entries(folder):
        if not is_folder(entry):
            yield below, printable(entry.name), entry
        elif not (entry.is_symlink() and _inode(Path(entry.path)) in above):
            yield from _walk(Path(entry.path), f"{below}/{printable(entry.name)}", above)


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
