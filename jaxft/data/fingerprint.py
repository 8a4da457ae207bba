"""Fingerprints of sources, which detect images that changed or that differ between hosts."""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.source import Source, Splits, images_per_class, is_multi_label, pixel_type
from jaxft.errors import first_of

_MAX_CLASSES = 8  # classes in one line


def fingerprint(source: Source) -> str:
    """Returns a hex digest of the source's class names and of its examples, in their order.

    Sources with the same digest train the same way. The digest covers each example's target and:

    - for an image file: its path below the split's folder and its size in bytes, not its content;
    - for an image in memory: its pixels;
    - for a TFDS record: the data set's name and version, its split, the split's size in bytes, and
      the record's position;
    - for any other source: the str or bytes that its method `identity(index)` returns, if any.
    """
    digest = hashlib.sha256()
    for name in source.classes:
        digest.update(_encode(name) + b"\0")
    digest.update(np.asarray(source.targets, "<i4").tobytes())
    for index in range(len(source)):
        digest.update(b"\0" + _encode(identity(source, index)))
    return digest.hexdigest()


def identity(source: Any, index: int) -> str | bytes:
    """Returns the source's `identity(index)`, or "" if the source does not define it."""
    method = getattr(source, "identity", None)
    return method(index) if method else ""


def record(splits: Splits) -> dict[str, Any]:
    """Returns the data set facts that a checkpoint stores and that must match on resume."""
    sources = {"train": splits.train, "val": splits.val}
    classes = splits.train.classes
    return {
        **{name: len(source) for name, source in sources.items()},
        "classes": list(classes),
        "pixels": pixel_type(splits.train).name,
        "multi_label": is_multi_label(splits.train),
        "per_class": {name: images_per_class(source).tolist() for name, source in sources.items()},
        "fingerprint": {name: fingerprint(source) for name, source in sources.items()},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns one line for each difference between two results of `record`.

    Class counts and fingerprints, which older checkpoints lack, are compared only if both have
    them.
    """
    lines = []
    labels = [facts.get("multi_label", False) for facts in (before, now)]
    if labels[0] != labels[1]:
        old, new = ("several labels" if several else "one class" for several in labels)
        lines.append(f"each image has {old} then, {new} now")
    old_classes, new_classes = before["classes"], now["classes"]
    if old_classes != new_classes:
        lines.append(_class_change(old_classes, new_classes))
    for split in ("train", "val"):
        counts = [facts.get("per_class", {}).get(split) for facts in (before, now)]
        digests = [facts.get("fingerprint", {}).get(split) for facts in (before, now)]
        counts_comparable = old_classes == new_classes and all(counts)
        if before[split] != now[split]:
            line = f"{split}: {before[split]} images then, {now[split]} now"
            if counts_comparable:
                line += f"; {_count_changes(new_classes, *counts)}"
            lines.append(line)
        elif counts_comparable and counts[0] != counts[1]:
            lines.append(f"{split}: {_count_changes(new_classes, *counts)}")
        elif old_classes == new_classes and all(digests) and digests[0] != digests[1]:
            lines.append(
                f"{split}: as many images of each class, but some are different (name, size, "
                "content or order)"
            )
    return lines


def _class_change(before: list[str], now: list[str]) -> str:
    removed = [name for name in before if name not in now]
    added = [name for name in now if name not in before]
    line = f"classes: {len(before)} then, {len(now)} now"
    if removed:
        line += f"; no longer there: {_join(removed)}"
    if added:
        line += f"; new: {_join(added)}"
    return line if removed or added else f"{line}: the same in another order"


def _count_changes(classes: list[str], before: list[int], now: list[int]) -> str:
    differing = [
        f"{name} {old} then, {new} now"
        for name, old, new in zip(classes, before, now, strict=True)
        if old != new
    ]
    return _join(differing, "; ")


def _join(names: list[str], separator: str = ", ") -> str:
    return separator.join(first_of(names, _MAX_CLASSES))


def _encode(text: str | bytes) -> bytes:
    # File systems differ in composed and decomposed letters; names may hold invalid UTF-8.
    if isinstance(text, bytes):
        return text
    return unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
