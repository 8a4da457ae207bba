"""Downloads a file into the cache: resumes broken transfers and verifies the hash."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.console import Console as Terminal

from jaxft.errors import WeightsError
from jaxft.progress import track
from jaxft.weights.http import (
    TransferError,
    is_secure,
    open_url,
    read_chunks,
    starts_at,
    strong_etag,
)

RETRY_DELAY = 1.0  # seconds, times the number of consecutive failures
MAX_FAILURES = 4  # consecutive requests without new data

_ReportProgress = Callable[[int, int | None], None]
"""Receives the bytes downloaded and the size of the file, if known."""


def download(url: str, *, sha256: str | None = None) -> Path:
    """Downloads a file, unless it is in the cache.

    A broken transfer is resumed. So is the download of a killed process if a hash is given, which
    verifies that the parts belong together. If several processes want the same file, one downloads
    it and the others wait.

    Args:
      url: https URL, or http URL on this machine.
      sha256: First digits of the file's hash, in hex. It is checked at every use of the cached
        file. Without it the file is not verified.

    Returns:
      Path in the cache.

    Raises:
      WeightsError: The download failed. Nothing of the file is left in the cache.
    """
    if not is_secure(url):
        raise WeightsError(f"{url} would be transferred unencrypted: give an https:// URL.")
    path = cached_path(url)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _is_valid(path, sha256):
            with part.open("a+b") as file:
                _lock(file, url)
                # Otherwise the process that held the lock has renamed or removed the file.
                if _is_same_file(part, file):
                    _download_locked(path, part, file, url, sha256)
                    return path
    except OSError as error:  # of the file system; `http` catches network errors
        raise _download_error(url, f"{error}. JAXFT_CACHE can name another folder") from error
    return path


def cached_path(url: str) -> Path:
    """Returns the path of a URL's file in the cache; a user may also copy the file there."""
    name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2])[-100:]
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def cache_folder() -> Path:
    """Returns `$JAXFT_CACHE`, or else `jaxft` in the user's cache folder."""
    jaxft_cache, user_cache = os.environ.get("JAXFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(jaxft_cache or Path(user_cache or "~/.cache") / "jaxft").expanduser()


def sha256_of(path: Path) -> str:
    """Computes the hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_valid(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or sha256_of(path).startswith(sha256))


def _is_same_file(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], url: str) -> None:
    try:
        flock(file, LOCK_EX | LOCK_NB)  # the kernel releases it even if the process is killed
    except BlockingIOError:
        Terminal(stderr=True).print(f"waiting for another process that downloads {url}")
        flock(file, LOCK_EX)


def _download_locked(path: Path, part: Path, file: IO[bytes], url: str, sha256: str | None) -> None:
    """Completes the partial file, which this process has locked, and renames it to `path`."""
    try:
        if _is_valid(path, sha256):  # another process has completed it meanwhile
            part.unlink()
            return
        path.unlink(missing_ok=True)
        if sha256 is None:  # whether another process's bytes belong to this version is unknown
            _truncate(file)
        if not (sha256 is not None and _is_valid(part, sha256)):
            name, terminal = urlsplit(url).path.rpartition("/")[2], Terminal(stderr=True)
            with track(name, None, "bytes", terminal=terminal) as work:
                _transfer_verified(url, file, part, sha256, work.update)
        part.replace(path)
    except Exception:  # not KeyboardInterrupt: the next call resumes from the partial file
        part.unlink(missing_ok=True)
        raise


def _transfer_verified(
    url: str, file: IO[bytes], part: Path, sha256: str | None, report: _ReportProgress
) -> None:
    """Transfers the rest of the file and checks its hash."""
    has_several_parts = _transfer(url, file, sha256 is not None, report)
    if sha256 is None or _is_valid(part, sha256):
        return
    if has_several_parts:  # perhaps of two versions
        _truncate(file)
        _transfer(url, file, True, report)
        if _is_valid(part, sha256):
            return
    raise _download_error(
        url,
        f"its sha256 is {sha256_of(part)} and should begin with {sha256}. Run again; if the error "
        "persists, the file on the server is another one, or the given hash is wrong",
    )


def _transfer(url: str, file: IO[bytes], has_hash: bool, report: _ReportProgress) -> bool:
    """Appends the missing bytes to the file, with retries.

    Returns:
      Whether the file consists of several parts.
    """
    etag: str | None = None
    initial_size = largest_size = file.seek(0, os.SEEK_END)
    failures, has_several_parts = 0, False
    while True:
        start = file.seek(0, os.SEEK_END)
        if start and not (has_hash or etag):
            start = _truncate(file)
        try:
            with open_url(url, start, etag) as response:
                if start and not starts_at(response, start):
                    start = _truncate(file)
                has_several_parts = has_several_parts or start > 0
                etag = strong_etag(response)
                length = response.headers.get("Content-Length", "")
                total = start + int(length) if length.isdigit() else None
                _check_disk_space(url, start, total)
                for chunk in read_chunks(response):
                    file.write(chunk)
                    report(file.tell(), total)
            size = file.tell()
            if total is not None and size < total:
                raise TransferError(f"the connection ended after {size:,} of {total:,} bytes")
            file.flush()
            os.fsync(file.fileno())
            return has_several_parts
        except TransferError as error:
            size = file.seek(0, os.SEEK_END)
            if error.must_restart:
                _truncate(file)
            failures = 1 if size > largest_size else failures + 1
            largest_size = max(size, largest_size)
            # A network that fails within a file may come back. One that fails before the first byte
            # is misconfigured.
            if error.is_permanent or (error.is_unreachable and largest_size == initial_size):
                raise _download_error(url, str(error)) from error
            if failures == MAX_FAILURES:
                cause = f"{error}, {MAX_FAILURES} times in a row; run again later"
                raise _download_error(url, cause) from error
            time.sleep(RETRY_DELAY * failures)


def _truncate(file: IO[bytes]) -> int:
    file.seek(0)  # `truncate` alone would leave the position
    return file.truncate()


def _check_disk_space(url: str, start: int, total: int | None) -> None:
    free = shutil.disk_usage(cache_folder()).free
    if total is not None and total - start > free:
        raise _download_error(
            url,
            f"it needs {(total - start) / 1e6:,.0f} MB and {cache_folder()} has {free / 1e6:,.0f} "
            "MB left. JAXFT_CACHE can name another folder",
        )


def _download_error(url: str, cause: str) -> WeightsError:
    return WeightsError(
        f"cannot download {url}: {cause}. "
        f"Or download it elsewhere, and copy it to {cached_path(url)} or pass its path."
    )
