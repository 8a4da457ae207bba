"""Whether the files of a folder are still those that were written.

Orbax finds a file that is gone or cut short, but not always one whose bytes have changed: a
flipped bit of a weight restores as another weight.
"""

import json
import zlib
from collections.abc import Iterator

from etils import epath

from jaxft import atomic

_FILE = "checksums.json"


def seal(folder: epath.Path) -> None:
    """Notes the CRC-32 of each file in the folder, in one more file."""
    sums = {name: _crc32(folder / name) for name in sorted(_files(folder))}
    atomic.write(folder / _FILE, json.dumps(sums))


def damage(folder: epath.Path) -> str:
    """What has changed since the folder was sealed, in a few words; empty if nothing has.

    Empty as well if it never was: then its reader must find out.
    """
    file = folder / _FILE
    if not file.exists():
        return ""
    try:
        sums = dict(json.loads(file.read_text()))
    except ValueError:
        return f"{_FILE} is not readable"
    if gone := sorted(sums.keys() - set(_files(folder))):
        return f"{gone[0]} is missing"
    changed = (name for name, crc in sums.items() if _crc32(folder / name) != crc)
    return f"{name} has changed" if (name := next(changed, "")) else ""


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Those in its subfolders: Orbax writes to its own once more, last of all, and can miss it."""
    for path in (folder / prefix).iterdir():
        if path.is_dir():
            yield from _files(folder, f"{prefix}{path.name}/")
        elif prefix:
            yield prefix + path.name


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc
