"""Every image is decoded once before a run, so that it cannot die of one later."""

import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from jaxft.data.concat import take
from jaxft.data.decode import decode
from jaxft.data.source import Checkable, Source
from jaxft.data.split_expressions import shown
from jaxft.errors import DataError, first_of

S = TypeVar("S", bound=Source)
OnBadImage = Literal["error", "skip"]
"""What becomes of images that cannot be read: they end the run before it starts, or are left out
of it, and said."""

_SHOWN = 5  # images named in one message
_reading = threading.local()  # `place`: the image that a thread checks


def problem(file: Path | bytes, place: str) -> str | None:
    """`place` and why the file cannot be decoded, or None if it can."""
    _reading.place = place
    try:
        decode(file, reduce_to=1)  # a JPEG at an eighth of its size, which reads all its bytes
    except DataError as error:
        return f"{place}: {error}"
    finally:
        del _reading.place
    return None


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silences Pillow's warnings of files, which `checked` has collected with the files' names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


def checked(
    sources: Mapping[str, S], on_bad_image: OnBadImage
) -> tuple[dict[str, S], tuple[str, ...]]:
    """The sources, by the names of their splits, without what cannot be read; and remarks.

    The remarks name what is left out, and images of which Pillow warns.

    Raises:
      DataError: some images cannot be read and `on_bad_image` is "error"; or a class would lose
        all of its images; or `on_bad_image` is unknown.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise DataError(f"unknown on_bad_image '{on_bad_image}': use error or skip.")
    with _collected_warnings() as warned:
        found = {name: _problems(source) for name, source in sources.items()}
    problems = sorted({line for lines in found.values() for line in lines.values()})
    total = sum(map(len, sources.values()))
    remarks = []
    if warned:
        remarks.append(
            f"Read, but with a warning: {len(warned)} of {total} images:"
            f"{_listing([f'{place}: {text}' for place, text in sorted(warned.items())])}"
        )
    if not problems:
        return dict(sources), tuple(remarks)
    listing = _listing(problems)
    if on_bad_image == "error":
        raise DataError(
            f"{len(problems)} of {total} images cannot be read; replace or remove them, or leave "
            f"them out with on_bad_image='skip':{listing}"
        )
    good = {name: _without(source, found[name]) for name, source in sources.items()}
    emptied = [
        f"{source.classes[target]} ({name})"
        for name, source in sources.items()
        for target in np.setdiff1d(source.targets, good[name].targets)
    ]
    if emptied:
        raise DataError(
            f"without the images that cannot be read, none are left of {shown(emptied)}; "
            f"replace them:{listing}"
        )
    left_out = f"Left out {len(problems)} of {total} images, which cannot be read:{listing}"
    return good, (left_out, *remarks)


def _listing(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in first_of(lines, _SHOWN))


@contextmanager
def _collected_warnings() -> Iterator[dict[str, str]]:
    """Collects the warnings of the images that threads check: the first one of each, by place."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        print_warning = warnings.showwarning

        def collect(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if (place := getattr(_reading, "place", None)) is None:  # of something else
                print_warning(message, *args, **kwargs)
            else:
                found.setdefault(place, str(message))

        # Filters belong to the process: they are set here, around all threads. Pillow also warns of
        # the images that are refused for their size.
        warnings.filterwarnings("always", category=UserWarning, module=r"PIL\.|jaxft\.data\.decode")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.showwarning = collect
        yield found


def _without(source: S, bad: dict[int, str]) -> S:
    if not bad:
        return source
    return take(source, np.setdiff1d(np.arange(len(source)), list(bad)))


def _problems(source: Source) -> dict[int, str]:
    if not isinstance(source, Checkable):
        return {}
    check, stopped = source.problem, threading.Event()

    def among(indices: range) -> dict[int, str]:
        found = {}
        for k in indices:
            if stopped.is_set():
                break
            if (problem := check(k)) is not None:
                found[k] = problem
        return found

    # One task a thread, each with a slice of the images: a future an image would cost more than
    # the list of images itself.
    threads = min(32, (os.cpu_count() or 1) + 1)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(among, [range(k, len(source), threads) for k in range(threads)])
        try:
            return {index: problem for part in found for index, problem in part.items()}
        finally:
            stopped.set()  # a signal ends the wait above, and the pool waits for its threads
