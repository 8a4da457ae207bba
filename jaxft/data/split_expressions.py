"""Split expressions: TFDS's slices by position, and the same slices within each class.

train                 a whole split; all: every split
train[:80%]           by position, in examples or percent, from the end if negative, as in TFDS
train[10/class]       10 of each class, in a seeded order: the same as train[:10/class]
train[80%:/class]     what train[:80%/class] leaves: slices of that order do not overlap
train[:50%]+test      one after the other
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.source import Source
from jaxft.errors import DataError

_PART = re.compile(r"(?P<split>[\w-]+)(?:\[(?P<slice>[^\[\]]*)\])?")
_SLICE = re.compile(r"(?P<start>[^:/]*)(?P<colon>:)?(?P<stop>[^:/]*?)(?P<per_class>/class)?")
_BOUND = re.compile(r"-?[0-9]+(?:_[0-9]+)*(?P<percent>(?:\.[0-9]+)?%)?")
_FORMS = (
    "write train, train[:80%], train[100:], train[:50%]+train[75%:], or within each class, in a "
    "seeded order, train[10/class], train[80%:/class]."
)


@dataclass(frozen=True)
class Bound:
    """One end of a slice: a number of examples, or of percent; negative counts from the end."""

    value: float
    percent: bool

    def position(self, count: int) -> int:
        """The bound as a position among `count` examples, rounded as TFDS does ("closest").

        Raises:
          IndexError: it lies outside of them.
        """
        value = round(self.value * count / 100) if self.percent else int(self.value)
        if abs(value) > count:
            raise IndexError(value)
        return value + count if value < 0 else value


@dataclass(frozen=True)
class Part:
    """One term of an expression: `split[start:stop]`, or `split[start:stop/class]`."""

    text: str
    split: str
    start: Bound | None = None
    stop: Bound | None = None
    per_class: bool = False

    def range(self, count: int) -> tuple[int, int]:
        """The slice as two positions among `count` examples; IndexError if it exceeds them."""
        first = 0 if self.start is None else self.start.position(count)
        return first, count if self.stop is None else self.stop.position(count)


def parse(expression: str) -> tuple[Part, ...]:
    """The terms of a split expression.

    Raises:
      DataError: some term has none of the forms above.
    """
    parts, problems = [], []
    for text in expression.split("+"):
        try:
            parts.append(_part(text.strip()))
        except ValueError as error:
            problems.append(f"'{text.strip()}' {error}")
    if problems:
        raise DataError(f"split '{expression}': {'; '.join(problems)}: {_FORMS}")
    return tuple(parts)


def _part(text: str) -> Part:
    part = _PART.fullmatch(text)
    if not part:
        raise ValueError("is not a split or a slice of one")
    if part["slice"] is None:
        return Part(text, part["split"])
    if part["split"] == "all":
        raise ValueError("slices all splits at once: slice them one by one")
    found = _SLICE.fullmatch(part["slice"])
    if not found or not (found["start"] or found["stop"]):
        raise ValueError("has no valid slice")
    start, stop = _bound(found["start"]), _bound(found["stop"])
    per_class = found["per_class"] is not None
    if start and stop and start.percent != stop.percent:
        raise ValueError("mixes examples and percent")
    if not found["colon"]:
        if not per_class:
            raise ValueError("names one position, not a slice (a colon is missing)")
        start, stop = None, start
    return Part(text, part["split"], start, stop, per_class)


def _bound(text: str) -> Bound | None:
    if not text:
        return None
    match = _BOUND.fullmatch(text)
    if not match:
        raise ValueError(f"has the bound '{text}', which is neither an integer nor a percentage")
    bound = Bound(float(text.rstrip("%")), True) if match["percent"] else Bound(int(text), False)
    if bound.percent and abs(bound.value) > 100:
        raise ValueError(f"has the bound '{text}', outside of -100%..100%")
    return bound


def indices(part: Part, source: Source, seed: int) -> np.ndarray:
    """The examples that a part selects of its split, int64 [k], in the split's order.

    Raises:
      DataError: there are none, or a bound exceeds what the split, or one of its classes, holds.
    """
    if not part.per_class:
        try:
            chosen = np.arange(*part.range(len(source)))
        except IndexError as error:
            raise DataError(
                f"split '{part.text}' exceeds {part.split}, which has {len(source)} images."
            ) from error
    else:
        slices = []
        for members in class_orders(source, seed):
            # A class that the split lacks altogether has nothing to give, and is no mistake.
            try:
                first, last = part.range(len(members)) if len(members) else (0, 0)
            except IndexError as error:
                raise DataError(
                    f"split '{part.text}' exceeds some classes of {part.split}. "
                    f"Images per class: {tally(source)}."
                ) from error
            slices.append(members[first:last])
        chosen = np.sort(np.concatenate(slices))
    if not len(chosen):
        raise DataError(
            f"split '{part.text}' is empty: it selects none of the {len(source)} images of "
            f"{part.split}. Images per class: {tally(source)}."
        )
    return chosen


def class_orders(source: Source, seed: int) -> list[np.ndarray]:
    """The examples of each class in a seeded order, which everything drawn within classes follows.

    One order serves all wishes, so that of one seed fewer examples are a subset of more.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(source.targets, minlength=len(source.classes))
    by_class = np.argsort(source.targets, kind="stable")
    return [rng.permutation(members) for members in np.split(by_class, np.cumsum(counts)[:-1])]


def tally(source: Source) -> str:
    """Classes with their numbers of images, the scarcest first, since they are what limits."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    scarcest = np.argsort(counts, kind="stable")
    return shown([f"{source.classes[k]} {counts[k]}" for k in scarcest])


def shown(names: Sequence[str], most: int = 5) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
