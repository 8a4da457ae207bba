"""Digests of the examples of a source: they tell when images have changed, or differ by host."""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.source import Source, Splits, pixel_type
from jaxft.errors import first_of

_SHOWN = 8  # classes named in one line


def fingerprint(source: Source) -> str:
    """Returns a digest of the source's class names and, in their order, of its examples, as hex.

    Two sources with the same digest train the same way. An example counts with its target and:

    - an image file: its path below the folder of its split, and its size in bytes (one `stat`),
      but not its content;
    - an image in memory: its pixels;
    - a record of TensorFlow Datasets: name and version of the set, split, size of the split in
      bytes, and position;
    - an example of any other source: what its method `identity(index)` returns, a str or bytes;
      without that method, nothing more than the target.
    """
    digest = hashlib.sha256()
    for name in source.classes:
        digest.update(_encoded(name) + b"\0")
    digest.update(np.asarray(source.targets, "<i4").tobytes())
    for index in range(len(source)):
        digest.update(b"\0" + _encoded(identity(source, index)))
    return digest.hexdigest()


def identity(source: Any, index: int) -> str | bytes:
    """Returns what the source knows of an example without decoding it, or an empty string."""
    known = getattr(source, "identity", None)
    return known(index) if known else ""


def record(splits: Splits) -> dict[str, Any]:
    """Returns the facts of the images that a checkpoint keeps and a resumed run must find again."""
    both = {"train": splits.train, "val": splits.val}
    classes = splits.train.classes
    return {
        **{name: len(source) for name, source in both.items()},
        "classes": list(classes),
        "pixels": pixel_type(splits.train).name,
        "per_class": {
            name: np.bincount(source.targets, minlength=len(classes)).tolist()
            for name, source in both.items()
        },
        "fingerprint": {name: fingerprint(source) for name, source in both.items()},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference of two `record`s, none if they agree.

    A record of an older version has no counts by class and no fingerprint: these are not compared.
    """
    lines = []
    same_classes = before["classes"] == now["classes"]
    if not same_classes:
        lost = [name for name in before["classes"] if name not in now["classes"]]
        new = [name for name in now["classes"] if name not in before["classes"]]
        order = "" if lost or new else ": the same in another order"
        gone = f"; no longer there: {_listed(lost)}" if lost else ""
        added = f"; new: {_listed(new)}" if new else ""
        lines.append(
            f"classes: {len(before['classes'])} then, {len(now['classes'])} now{order}{gone}{added}"
        )
    for name in ("train", "val"):
        counts = [which.get("per_class", {}).get(name) for which in (before, now)]
        digests = [which.get("fingerprint", {}).get(name) for which in (before, now)]
        known = same_classes and all(counts)
        if before[name] != now[name]:
            line = f"{name}: {before[name]} images then, {now[name]} now"
            lines.append(f"{line}; {_by_class(now['classes'], *counts)}" if known else line)
        elif known and counts[0] != counts[1]:
            lines.append(f"{name}: {_by_class(now['classes'], *counts)}")
        elif same_classes and all(digests) and digests[0] != digests[1]:
            lines.append(
                f"{name}: as many images of each class, but some are others: names, sizes, "
                "contents or their order differ"
            )
    return lines


def _by_class(classes: list[str], before: list[int], now: list[int]) -> str:
    differing = [
        f"{name} {then} then, {count} now"
        for name, then, count in zip(classes, before, now, strict=True)
        if then != count
    ]
    return _listed(differing, "; ")


def _listed(names: list[str], separator: str = ", ") -> str:
    return separator.join(first_of(names, _SHOWN))


def _encoded(text: str | bytes) -> bytes:
    # File systems return composed or decomposed letters, and bytes that are not UTF-8.
    if isinstance(text, bytes):
        return text
    return unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
