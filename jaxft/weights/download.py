"""Downloads a file once: taken up again where it broke, and checked before it counts."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxft.errors import WeightsError
from jaxft.weights.http import BrokenError, chunks, goes_on, is_safe, open_from, validator_of

RETRY_DELAY = 1.0  # seconds, times the number of failures in a row
TRIES = 4  # in a row that bring nothing new

_Show = Callable[[int, int | None], None]  # bytes there, bytes in all if known


def download(url: str, *, sha256: str | None = None) -> Path:
    """The file behind an https URL (or http on this machine), from the cache if it is there.

    sha256: what the file's hash begins with, in hex; checked at every use. Without it a file is
      taken as it comes.

    A connection that breaks is taken up again where it broke. So is the download of a process
    that was killed, given a hash to check the sum of the parts by. Of several processes one
    downloads and the others wait.

    Raises:
      WeightsError: the file is not to be had; then the cache holds nothing of it.
    """
    if not is_safe(url):
        raise WeightsError(f"{url} would come unencrypted: give an https:// URL.")
    path = cached_path(url)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _is_good(path, sha256):
            with part.open("a+b") as file:
                _lock(file, url)
                if _is_at(part, file):  # else the lock's former holder has renamed or removed it
                    _complete(path, part, file, url, sha256)
                    return path
    except OSError as error:  # of the file system; those of the network are caught where they rise
        raise _failure(url, f"{error}. JAXFT_CACHE can name another folder") from error
    return path


def cached_path(url: str) -> Path:
    """Where a URL's file lies once it is there; a copy brought by hand serves as well."""
    name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2])[-100:]
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def cache_folder() -> Path:
    """`$JAXFT_CACHE`, else `jaxft` in the user's folder for caches."""
    own, general = os.environ.get("JAXFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(general or "~/.cache") / "jaxft").expanduser()


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_good(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or sha256_of(path).startswith(sha256))


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], url: str) -> None:
    try:
        flock(file, LOCK_EX | LOCK_NB)  # the kernel frees it on any death
    except BlockingIOError:
        Terminal(stderr=True).print(f"waiting for another process that downloads {url}")
        flock(file, LOCK_EX)


def _complete(path: Path, part: Path, file: IO[bytes], url: str, sha256: str | None) -> None:
    """The partial file, whose lock we hold, becomes the whole one or goes."""
    try:
        if _is_good(path, sha256):  # since we looked
            part.unlink()
            return
        path.unlink(missing_ok=True)
        if sha256 is None:  # nothing could tell whether another process's bytes fit
            _emptied(file)
        if not (sha256 is not None and _is_good(part, sha256)):
            with _progress(urlsplit(url).path.rpartition("/")[2]) as show:
                _fetch(url, file, part, sha256, show)
        part.replace(path)
    except Exception:  # not KeyboardInterrupt: the next call goes on from there
        part.unlink(missing_ok=True)
        raise


def _fetch(url: str, file: IO[bytes], part: Path, sha256: str | None, show: _Show) -> None:
    """Fills the file, and checks it."""
    pieced = _transfer(url, file, sha256 is not None, show)
    if sha256 is None or _is_good(part, sha256):
        return
    if pieced:  # the pieces may be of two versions
        _emptied(file)
        _transfer(url, file, True, show)
        if _is_good(part, sha256):
            return
    raise _failure(
        url,
        f"its sha256 is {sha256_of(part)} and should begin with {sha256}. Run again; if it stays "
        "so, the file there is another one, or the hash was given wrongly",
    )


def _transfer(url: str, file: IO[bytes], has_hash: bool, show: _Show) -> bool:
    """Appends what is missing; whether the whole came in more than one piece."""
    validator: str | None = None
    begun = furthest = file.seek(0, os.SEEK_END)
    failures, pieced = 0, False
    while True:
        start = file.seek(0, os.SEEK_END)
        if start and not (has_hash or validator):
            start = _emptied(file)
        try:
            with open_from(url, start, validator) as response:
                if start and not goes_on(response, start):
                    start = _emptied(file)
                pieced = pieced or start > 0
                validator = validator_of(response)
                length = response.headers.get("Content-Length", "")
                total = start + int(length) if length.isdigit() else None
                _check_space(url, file, start, total)
                for chunk in chunks(response):
                    file.write(chunk)
                    show(file.tell(), total)
            size = file.tell()
            if total is not None and size < total:
                raise BrokenError(f"the connection ended after {size:,} of {total:,} bytes")
            file.flush()
            os.fsync(file.fileno())
            return pieced
        except BrokenError as broken:
            size = file.seek(0, os.SEEK_END)
            if broken.starts_over:
                _emptied(file)
            failures = 1 if size > furthest else failures + 1
            furthest = max(size, furthest)
            # A network that fails in the middle of a file may come back; one at its start is wrong.
            if broken.lasts or (broken.without_reply and furthest == begun):
                raise _failure(url, str(broken)) from broken
            if failures == TRIES:
                raise _failure(
                    url, f"{broken}, {TRIES} times in a row; run again later"
                ) from broken
            time.sleep(RETRY_DELAY * failures)


def _emptied(file: IO[bytes]) -> int:
    file.seek(0)  # truncation alone leaves the position, and `tell`, where they were
    return file.truncate()


def _check_space(url: str, file: IO[bytes], start: int, total: int | None) -> None:
    free = shutil.disk_usage(cache_folder()).free
    if total is not None and total - start > free:
        raise _failure(
            url,
            f"it needs {(total - start) / 1e6:,.0f} MB and {cache_folder()} has {free / 1e6:,.0f} "
            "MB left. JAXFT_CACHE can name another folder",
        )


@contextmanager
def _progress(name: str) -> Iterator[_Show]:
    """A bar, on a terminal only; it leaves nothing behind."""
    out = Terminal(stderr=True)
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _failure(url: str, cause: str) -> WeightsError:
    return WeightsError(
        f"cannot download {url}: {cause}. "
        f"A copy from elsewhere serves as well: as {cached_path(url)}, or by its own path."
    )
