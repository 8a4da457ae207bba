"""Keeps compiled programs between runs, in JAX's persistent compilation cache.

JAX finds a program by its operations, the versions of jaxlib, the flags of XLA and the processors,
so that an entry never serves another recipe, version or machine. It compiles again where an entry
cannot be read, but leaves the entry as it is; `keep_programs` also deletes it.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxft.cli.process import fail
from jaxft.weights.download import cache_folder

MAX_BYTES = 2**30
"""Size of the folder above which a start of a command deletes its oldest entries."""

_ERROR = (
    "Error (?P<action>reading|writing) persistent compilation cache entry for '(?P<program>.*?)': "
    "(?P<error>.*)"
)


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, for programs of any size.

    It lies under `programs` in the folder of downloaded weights. `JAX_COMPILATION_CACHE_DIR` names
    another folder, which is not kept below `MAX_BYTES`, and `JAX_ENABLE_COMPILATION_CACHE=false`
    turns it off. Without a folder that can be written, as without a home, nothing is cached.
    """
    given: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    folder = Path(given) if given else cache_folder() / "programs"
    if given is None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            _delete_oldest(folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX leaves out programs that compile within a second. A run has a dozen of
        # them, and they take longer to compile than the step takes to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("always", _ERROR, UserWarning)
    warnings.showwarning = _with_repair(warnings.showwarning, folder)


def _delete_oldest(folder: Path) -> None:
    """Deletes the entries that have not been used for longest, down to half of `MAX_BYTES`."""
    entries = [(entry, entry.stat()) for entry in folder.glob("*-cache")]
    size = sum(stat.st_size for _, stat in entries)
    if size <= MAX_BYTES:
        return
    for entry, stat in sorted(entries, key=lambda pair: pair[1].st_atime):
        if size > MAX_BYTES // 2:
            entry.unlink(missing_ok=True)
            size -= stat.st_size


def _with_repair(show: Callable[..., None], folder: Path) -> Callable[..., None]:
    """Returns a `warnings.showwarning` that handles JAX's warnings about the cache.

    A damaged entry, as a full disk or a killed process leaves it, is deleted, and JAX writes it
    again. The first other error is printed as one line.
    """
    is_reported = False

    def showwarning(message: Warning | str, *rest: Any) -> None:
        nonlocal is_reported
        match = re.match(_ERROR, str(message))
        if match is None:
            show(message, *rest)
        elif match["action"] == "reading" and "[Errno" not in match["error"]:
            for entry in folder.glob(f"{match['program']}-*-cache"):
                with suppress(OSError):
                    entry.unlink()
        elif not is_reported:
            is_reported = True
            fail(f"Compiled programs cannot be kept in {folder}: {match['error']}", 0)

    return showwarning
