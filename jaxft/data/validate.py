"""Decodes images once before a run, so that an unreadable image cannot end the run later.

`jaxft.data.check_sample` chooses the images. If a run has several processes, each decodes its part
of them, and all report the same ones.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from PIL import Image

from jaxft.data.check_sample import images_to_check
from jaxft.data.class_names import join_names
from jaxft.data.concat import take
from jaxft.data.decode import decode
from jaxft.data.source import Checkable, Source, emptied_classes
from jaxft.errors import DataError, first_of
from jaxft.progress import Work, track

S = TypeVar("S", bound=Source)
OnBadImage = Literal["error", "skip"]
"""Treatment of unreadable images: raise an error, or leave them out of the run."""
Check = Literal["all", "sample"]
"""Images that are decoded before a run."""


class Findings(NamedTuple):
    """Result of the check of some images, of JSON values.

    Attributes:
      problems: for each source, the index of each unreadable image and why it is unreadable.
      warnings: location of each image with a warning, and the first warning.
    """

    problems: list[list[tuple[int, str]]]
    warnings: dict[str, str]


Divide = Callable[[Callable[[int, int], Findings], Mapping[str, Source]], list[Findings]]
"""Returns the findings of all processes of a run; see `jaxft.divided_check.check_in_parts`."""

_MAX_IMAGES = 5  # images listed in one message
_thread = threading.local()  # `place`: location of the image that this thread checks


def problem(file: Path | bytes, place: str) -> str | None:
    """Returns the image's location and why it cannot be decoded, or None if it can.

    Args:
      file: path or content of the image file.
      place: the image's location in messages.
    """
    _thread.place = place
    try:
        decode(file, reduce_to=1)  # a JPEG at an eighth of its size; reads all bytes
    except DataError as error:
        return f"{place}: {error}"
    finally:
        del _thread.place
    return None


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silences Pillow's warnings about files, which `check_images` has already reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


def check_images(
    sources: Mapping[str, S],
    on_bad_image: OnBadImage,
    divide: Divide | None = None,
    *,
    sample_above: int | None = None,
) -> tuple[dict[str, S], tuple[str, ...]]:
    """Decodes the images of the sources, or a sample of them.

    Args:
      sources: sources by split name.
      on_bad_image: treatment of unreadable images. "skip" decodes all images: a batch is a function
        of its index only if the images are known before the run.
      divide: divides the images among the processes of a run; None: this process decodes all.
      sample_above: decodes a sample if all decoded images take more than this number of bytes;
        None: all.

    Returns:
      The sources without unreadable images, and remarks that list these images and the images with
      warnings of Pillow.

    Raises:
      DataError: `on_bad_image` is "error" and an image is unreadable; a class would lose all of
        its images; or `on_bad_image` is unknown.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise DataError(f"unknown on_bad_image '{on_bad_image}': use error or skip.")
    indices = images_to_check(sources, sample_above if on_bad_image == "error" else None)

    def check(part: int, parts: int) -> Findings:
        mine = {name: each[part::parts] for name, each in indices.items()}
        with (
            _collect_warnings() as found_warnings,
            track("Checking images", sum(map(len, mine.values()))) as work,
        ):
            found = [_find_problems(each, mine[name], work) for name, each in sources.items()]
        return Findings(found, found_warnings)

    findings = divide(check, sources) if divide else [check(0, 1)]
    image_warnings: dict[str, str] = {}
    problems: dict[str, dict[int, str]] = {name: {} for name in sources}
    for part in findings:
        image_warnings |= part.warnings
        for by_index, found in zip(problems.values(), part.problems, strict=True):
            by_index.update(found)
    # The splits may share images.
    lines = sorted({line for by_index in problems.values() for line in by_index.values()})
    total, images = sum(map(len, indices.values())), sum(map(len, sources.values()))
    remarks = []
    if total < images:
        remarks.append(
            f"{total:,} of {images:,} images have been checked, evenly spread. An unreadable one "
            "among the others would end the run; check='all' (--check all) checks all."
        )
    if image_warnings:
        warning_lines = [f"{place}: {text}" for place, text in sorted(image_warnings.items())]
        remarks.append(
            f"Read, but with a warning: {len(image_warnings)} of {total} images:"
            f"{_listing(warning_lines)}"
        )
    if not lines:
        return dict(sources), tuple(remarks)
    if on_bad_image == "error":
        raise DataError(
            f"{len(lines)} of {total} images cannot be read; replace or remove them, or leave "
            f"them out with on_bad_image='skip':{_listing(lines)}"
        )
    readable = {name: _drop(source, problems[name]) for name, source in sources.items()}
    emptied = [
        f"{source.classes[k]} ({name})"
        for name, source in sources.items()
        for k in emptied_classes(source, readable[name])
    ]
    if emptied:
        raise DataError(
            f"without the images that cannot be read, none are left of {join_names(emptied)}; "
            f"replace them:{_listing(lines)}"
        )
    left_out = f"Left out {len(lines)} of {total} images, which cannot be read:{_listing(lines)}"
    return readable, (left_out, *remarks)


def _listing(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in first_of(lines, _MAX_IMAGES))


@contextmanager
def _collect_warnings() -> Iterator[dict[str, str]]:
    """Collects the first warning about each image, by the image's location."""
    collected: dict[str, str] = {}
    with warnings.catch_warnings():
        print_warning = warnings.showwarning

        def collect(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if (place := getattr(_thread, "place", None)) is None:  # not about an image
                print_warning(message, *args, **kwargs)
            else:
                collected.setdefault(place, str(message))

        # Filters apply to the whole process, so they must be set outside of the threads. Pillow
        # also warns about images whose size `decode` refuses.
        warnings.filterwarnings("always", category=UserWarning, module=r"PIL\.|jaxft\.data\.decode")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.showwarning = collect
        yield collected


def _drop(source: S, problems: dict[int, str]) -> S:
    if not problems:
        return source
    return take(source, np.setdiff1d(np.arange(len(source)), list(problems)))


def _find_problems(source: Source, indices: np.ndarray, work: Work) -> list[tuple[int, str]]:
    """Returns index and problem of the unreadable images among those with these indices."""
    if not isinstance(source, Checkable):
        return []
    check, stop = source.problem, threading.Event()

    def check_slice(indices: np.ndarray) -> list[tuple[int, str]]:
        problems = []
        for k in indices.tolist():
            if stop.is_set():
                break
            if (problem := check(k)) is not None:
                problems.append((k, problem))
            work.advance()
        return problems

    # One task per thread: one future per image would take more memory than the file list.
    threads = min(32, (os.cpu_count() or 1) + 1)
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(check_slice, [indices[k::threads] for k in range(threads)])
        try:
            return [problem for result in results for problem in result]
        finally:
            stop.set()  # after a signal, so that the pool does not wait for all images
