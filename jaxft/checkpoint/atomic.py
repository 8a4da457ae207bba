"""Files that appear whole or not at all, on a disk or in a bucket."""

import os
from importlib import import_module
from os import PathLike
from pathlib import Path

from etils import epath

from jaxft.errors import RecipeError

# The client of each kind of bucket, and what installs it.
BUCKETS = {"gs": ("gcsfs", "jaxft[gcs]"), "s3": ("s3fs", "s3fs")}


def write(path: str | PathLike[str], content: bytes | str) -> None:
    """Writes a file, over any older one, so that no reader and no crash ever sees a part of it.

    `path` may be `gs://...`: there an object appears once all of it has arrived.

    Raises OSError with the file's name.
    """
    data = content.encode() if isinstance(content, str) else content
    place = anywhere(path)
    if in_bucket(place):
        place.write_bytes(data)
        return
    # In the same folder, so that the replacement is one step of the file system.
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        if error.errno is None:
            raise
        # A full disk's has no file name.
        raise OSError(error.errno, error.strerror, str(place)) from error
    finally:
        temporary.unlink(missing_ok=True)


def anywhere(path: str | PathLike[str]) -> Path:
    """Returns a path on a disk, whose `~` is expanded, or in a bucket, which does as those do.

    Raises RecipeError where no client of the bucket is installed.
    """
    if not in_bucket(path):
        return Path(os.path.expanduser(path))
    scheme, _, _ = os.fspath(path).partition("://")
    if scheme not in BUCKETS:
        raise RecipeError(f"{path} is no folder; in a bucket it is gs://... or s3://...")
    module, package = BUCKETS[scheme]
    try:
        import_module(module)
    except ImportError as error:
        raise RecipeError(
            f"{path} needs {module}, which cannot be imported: pip install '{package}'."
        ) from error
    return epath.Path(path)


def in_bucket(path: str | PathLike[str]) -> bool:
    """Whether it is of an object store: without append, locks, or renames in one step."""
    return "://" in os.fspath(path)
