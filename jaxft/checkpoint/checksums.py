"""Whether the files of a folder are still those that were written.

Orbax finds a file that is gone or cut short, but not always one whose bytes have changed: a
flipped bit of a weight restores as another weight.
"""

import json
import zlib
from collections.abc import Iterator

from etils import epath

from jaxft.checkpoint import atomic

_FILE = "checksums.json"


def seal(folder: epath.Path, *, subfolders_only: bool = False) -> None:
    """Writes the CRC-32 of each file in the folder, and of the list itself, to one more file.

    `subfolders_only` leaves out files that lie directly in the folder.
    """
    names = sorted(name for name in _files(folder) if "/" in name or not subfolders_only)
    sums = {name: _crc32(folder / name) for name in names if name != _FILE}
    atomic.write(folder / _FILE, json.dumps({**sums, _FILE: _of_list(sums)}))


def damage(folder: epath.Path, prefix: str = "") -> str:
    """Returns what has changed since the folder was sealed, in a few words; "" if nothing has.

    Also "" if the folder never was sealed: then its reader must find out. `prefix` restricts the
    check to files whose path in the folder begins with it.
    """
    file = folder / _FILE
    if not file.exists():
        return ""
    try:
        sums = dict(json.loads(file.read_text()))
        own = sums.pop(_FILE, None)  # absent in lists of older versions
    except (ValueError, TypeError):
        return f"{_FILE} is not readable"
    if own not in (None, _of_list(sums)):
        return f"{_FILE} has changed"
    for name, crc in sums.items():
        if name.startswith(prefix):
            if not (folder / name).exists():
                return f"{name} is missing"
            if _crc32(folder / name) != crc:
                return f"{name} has changed"
    return ""


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in (folder / prefix).iterdir():
        if path.is_dir():
            yield from _files(folder, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _of_list(sums: dict[str, int]) -> int:
    return zlib.crc32(json.dumps(sums).encode())


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc
