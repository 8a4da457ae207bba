"""Finds the samples in a tar file, grouped as WebDataset does, without reading the images.

A sample is a run of files with the same key. The key is the path up to the first dot of the file's
name, and the rest is the extension: `a/b.jpg` and `a/b.cls` are two files of the sample `a/b`.
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from jaxft.data.image_files import printable
from jaxft.errors import DataError

_NAME = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)")
_COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"(\xb5/": "zstd"}


class TarMember(NamedTuple):
    """Content of a file in a tar file: its start and size in bytes."""

    offset: int
    size: int


Sample = tuple[str, dict[str, TarMember]]
"""Key, and members by extension in lower case."""


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yields the samples of a tar file in their order. Ignores hidden files.

    Reads the headers only, which a compressed file does not allow.

    Raises:
      DataError: the file is missing, compressed, truncated or no tar file, or a sample has two
        files of the same extension.
    """
    with reading(shard) as file:
        if compression := _COMPRESSED.get(file.read(3)):
            raise DataError(
                f"{printable(shard)} is compressed ({compression}), so that its images cannot "
                "be read by their position: unpack it to a plain .tar file."
            )
        file.seek(0)
        yield from _grouped(shard, file)


@contextmanager
def reading(shard: Path) -> Iterator[IO[bytes]]:
    """Opens a tar file; an OSError while it is open becomes a DataError that names it."""
    try:
        with shard.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{printable(shard)} cannot be read: {error.strerror}.") from error


def _grouped(shard: Path, file: IO[bytes]) -> Iterator[Sample]:
    key, members = "", dict[str, TarMember]()
    for name, member in _members(shard, file):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        extension = match[2].lower()
        if match[1] != key:
            if members:
                yield key, members
            key, members = match[1], {}
        if extension in members:
            raise DataError(f"{printable(shard)}: {printable(name)} is there twice in a row.")
        members[extension] = member
    if members:
        yield key, members


def _members(shard: Path, file: IO[bytes]) -> Iterator[tuple[str, TarMember]]:
    """Yields name and content of each regular file."""
    size = shard.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all headers
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"{info.name} is truncated")
                if info.isreg():
                    yield info.name, TarMember(info.offset_data, info.size)
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise DataError(f"{printable(shard)} is no readable tar file: {error}.") from error
