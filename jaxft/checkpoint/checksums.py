"""Checksums of the files in a folder.

Orbax detects a missing or truncated file, but not every changed byte: a flipped bit of a weight is
restored as another value.
"""

import json
import zlib
from collections.abc import Iterator

from etils import epath

from jaxft.checkpoint import atomic

_FILE = "checksums.json"


def seal(folder: epath.Path, *, subfolders_only: bool = False) -> None:
    """Writes the CRC-32 of each file in the folder, and of the list itself, to one more file.

    Args:
      folder: Folder to seal.
      subfolders_only: Leave out files directly in the folder.
    """
    names = sorted(name for name in _relative_paths(folder) if "/" in name or not subfolders_only)
    checksums = {name: _file_crc32(folder / name) for name in names if name != _FILE}
    content = json.dumps({**checksums, _FILE: _list_crc32(checksums)})
    atomic.write(folder / _FILE, content)


def damage(folder: epath.Path, prefix: str = "") -> str:
    """Compares the files of a folder with its checksums.

    Args:
      folder: Folder. If it was never sealed, its reader must detect damage.
      prefix: Check only files whose path in the folder begins with this prefix.

    Returns:
      A description of the first difference, such as "params/d/3 has changed", or "".
    """
    file = folder / _FILE
    if not file.exists():
        return ""
    try:
        checksums = dict(json.loads(file.read_text()))
        list_checksum = checksums.pop(_FILE, None)  # absent in lists of older versions
    except (ValueError, TypeError):
        return f"{_FILE} is not readable"
    if list_checksum not in (None, _list_crc32(checksums)):
        return f"{_FILE} has changed"
    for name, checksum in checksums.items():
        if name.startswith(prefix):
            if not (folder / name).exists():
                return f"{name} is missing"
            if _file_crc32(folder / name) != checksum:
                return f"{name} has changed"
    return ""


def _relative_paths(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in (folder / prefix).iterdir():
        if path.is_dir():
            yield from _relative_paths(folder, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _list_crc32(checksums: dict[str, int]) -> int:
    return zlib.crc32(json.dumps(checksums).encode())


def _file_crc32(path: epath.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
