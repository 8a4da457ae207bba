"""Writes files atomically, on a disk or in a bucket."""

import os
from importlib import import_module
from os import PathLike
from pathlib import Path

from etils import epath

from jaxft.errors import RecipeError

BUCKETS = {"gs": ("gcsfs", "jaxft[gcs]"), "s3": ("s3fs", "s3fs")}
"""Client package, and the requirement that installs it, by scheme."""


def write(path: str | PathLike[str], content: bytes | str) -> None:
    """Writes a file so that readers and crashes never leave or see a part of it.

    On a disk, the content is written to a temporary file that then replaces an older one. In a
    bucket, an object appears once it is complete.

    Args:
      path: File on a disk, or `gs://...`.
      content: New content.

    Raises:
      OSError: The file cannot be written. The error has its name.
    """
    data = content.encode() if isinstance(content, str) else content
    target = anywhere(path)
    if in_bucket(target):
        target.write_bytes(data)
        return
    # In the same folder, because a rename is atomic only within a file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        # The error of a full disk has no file name.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def anywhere(path: str | PathLike[str]) -> Path:
    """Returns a path on a disk, with `~` expanded, or in a bucket, with the methods of `Path`.

    Raises:
      RecipeError: The scheme is unknown, or the client of the bucket is not installed.
    """
    if not in_bucket(path):
        return Path(os.path.expanduser(path))
    scheme, _, _ = os.fspath(path).partition("://")
    if scheme not in BUCKETS:
        raise RecipeError(f"{path} is no folder; in a bucket it is gs://... or s3://...")
    module, requirement = BUCKETS[scheme]
    try:
        import_module(module)
    except ImportError as error:
        raise RecipeError(
            f"{path} needs {module}, which cannot be imported: pip install '{requirement}'."
        ) from error
    return epath.Path(path)


def in_bucket(path: str | PathLike[str]) -> bool:
    """Returns whether a path is in a bucket, which has no append, locks or atomic renames."""
    return "://" in os.fspath(path)
