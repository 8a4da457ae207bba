"""Folders of image files in a bucket of Google Cloud Storage, listed in one go.

A bucket has no folders: its objects have names with slashes. All names below a folder come from one
listing of 1,000 objects per request, with their sizes, so that finding splits, classes and images
needs no further request. A read is one request.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.errors import DataError

SCHEME = "gs://"
_NO_LOG = logging.NullHandler()


@dataclass(frozen=True)
class BucketPath(os.PathLike[str]):
    """A file or folder in a bucket, with the methods of `pathlib.Path` and `os.DirEntry` in use.

    Attributes:
      url: `gs://BUCKET/...`, by which paths are compared.
      size: size of a file in bytes; None for a folder.
      entries: files and folders in a folder, by name; not pickled.
    """

    url: str
    size: int | None = field(default=None, compare=False)
    entries: dict[str, "BucketPath"] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Callable[..., "BucketPath"], tuple[str, int | None]]:
        return BucketPath, (self.url, self.size)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return self.entries.get(name) or BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPath":
        """The folder that holds it, without its entries."""
        return BucketPath(self.url.rpartition("/")[0])

    def is_file(self) -> bool:
        """Returns whether it is a file."""
        return self.size is not None

    def is_dir(self) -> bool:
        """Returns whether it is a folder with files below it."""
        return bool(self.entries)

    def is_symlink(self) -> bool:
        """Returns False: buckets have no links."""
        return False

    def read_bytes(self) -> bytes:
        """Returns the content of the file.

        Raises:
          DataError: it cannot be read. The message does not include the path.
        """
        try:
            content: bytes = _file_system().cat_file(self.url)
        except Exception as error:  # of HTTP, of the credentials, or of the network
            raise DataError(_reason(error)) from error
        return content


def content(path: Path | BucketPath) -> Path | bytes:
    """Returns the path of a file on a disk, or the content of a file in a bucket.

    Raises:
      DataError: the file in the bucket cannot be read. The message does not include the path.
    """
    return path.read_bytes() if isinstance(path, BucketPath) else path


def list_folder(url: str) -> BucketPath:
    """Lists all files below a folder of a bucket and returns the folder.

    Raises:
      DataError: gcsfs is missing, the bucket cannot be listed, or there is no such folder.
    """
    bucket = url.removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise DataError(f"{url} names no bucket: write folder:{SCHEME}BUCKET/PATH.")
    url = url.rstrip("/")
    try:
        found = _file_system().find(url, detail=True, update_cache=False)
    except ImportError as error:
        raise DataError(f"{url} needs gcsfs: pip install 'jaxft[gcs]'.") from error
    except FileNotFoundError as error:
        raise DataError(f"there is no bucket {bucket} ({url}).") from error
    except Exception as error:  # of HTTP, of the credentials, or of the network
        raise DataError(
            f"{url} cannot be listed: {_reason(error)}. Log in with 'gcloud auth "
            "application-default login'; the account needs the role Storage Object Viewer on the "
            f"bucket {bucket}."
        ) from error
    root = BucketPath(url)
    for path, facts in found.items():
        if f"{SCHEME}{path}" != url:  # a file of that name
            _add(root, f"{SCHEME}{path}".removeprefix(f"{url}/"), int(facts["size"]))
    return root


def _add(root: BucketPath, relative: str, size: int) -> None:
    """Adds a file to the entries of the folders above it.

    Ignores names with empty parts; one that ends in a slash stands for an empty folder.
    """
    *folders, name = parts = relative.split("/")
    if not all(parts):
        return
    for folder in folders:
        root = root.entries.setdefault(folder, BucketPath(f"{root.url}/{folder}"))
    root.entries[name] = BucketPath(f"{root.url}/{name}", size)


def _file_system() -> Any:
    import fsspec  # takes long to load

    # Without a handler, Python prints its log: a traceback for each attempt that fails.
    logging.getLogger("gcsfs").addHandler(_NO_LOG)
    return fsspec.filesystem("gs")  # one for the process


def _reason(error: Exception) -> str:
    """Returns the last line of an error; gcsfs puts the request before it."""
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
