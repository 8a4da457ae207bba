"""Split expressions: TFDS slices by position, and the same slices within each class.

train                 a whole split; all: every split
train[:80%]           by position, as in TFDS; negative bounds count from the end
train[10/class]       10 examples of each class in a seeded order; short for train[:10/class]
train[80%:/class]     the complement of train[:80%/class] in the same seeded order
train[:50%]+test      concatenation
"""

import re
from dataclasses import dataclass

import numpy as np

from jaxft.data.class_names import join_names
from jaxft.data.source import Source, images_per_class, is_multi_label
from jaxft.errors import DataError

_TERM = re.compile(r"(?P<split>[\w-]+)(?:\[(?P<slice>[^\[\]]*)\])?")
_SLICE = re.compile(r"(?P<start>[^:/]*)(?P<colon>:)?(?P<stop>[^:/]*?)(?P<per_class>/class)?")
_BOUND = re.compile(r"-?[0-9]+(?:_[0-9]+)*(?P<percent>(?:\.[0-9]+)?%)?")
_USAGE = (
    "write train, train[:80%], train[100:], train[:50%]+train[75%:], or within each class, in a "
    "seeded order, train[10/class], train[80%:/class]."
)


@dataclass(frozen=True)
class Bound:
    """One end of a slice: a number of examples or a percentage; negative counts from the end."""

    value: float
    is_percent: bool

    def position(self, count: int) -> int:
        """Returns the bound as a position among `count` examples.

        Percentages are rounded as by TFDS ("closest").

        Raises:
          IndexError: the position lies outside of the examples.
        """
        position = round(self.value * count / 100) if self.is_percent else int(self.value)
        if abs(position) > count:
            raise IndexError(position)
        return position + count if position < 0 else position


@dataclass(frozen=True)
class Term:
    """One term of an expression: `split[start:stop]` or `split[start:stop/class]`."""

    text: str
    split: str
    start: Bound | None = None
    stop: Bound | None = None
    per_class: bool = False

    def range(self, count: int) -> tuple[int, int]:
        """Returns the slice as (start, stop) among `count` examples.

        Raises:
          IndexError: a bound lies outside of the examples.
        """
        start = 0 if self.start is None else self.start.position(count)
        return start, count if self.stop is None else self.stop.position(count)


def parse(expression: str) -> tuple[Term, ...]:
    """Parses a split expression into its terms.

    Raises:
      DataError: a term has none of the forms listed in this module's docstring.
    """
    terms, problems = [], []
    for text in expression.split("+"):
        try:
            terms.append(_parse_term(text.strip()))
        except ValueError as error:
            problems.append(f"'{text.strip()}' {error}")
    if problems:
        raise DataError(f"split '{expression}': {'; '.join(problems)}: {_USAGE}")
    return tuple(terms)


def _parse_term(text: str) -> Term:
    term_match = _TERM.fullmatch(text)
    if not term_match:
        raise ValueError("is not a split or a slice of one")
    split, slice_text = term_match["split"], term_match["slice"]
    if slice_text is None:
        return Term(text, split)
    if split == "all":
        raise ValueError("slices all splits at once: slice them one by one")
    slice_match = _SLICE.fullmatch(slice_text)
    if not slice_match or not (slice_match["start"] or slice_match["stop"]):
        raise ValueError("has no valid slice")
    start, stop = _parse_bound(slice_match["start"]), _parse_bound(slice_match["stop"])
    per_class = slice_match["per_class"] is not None
    if start and stop and start.is_percent != stop.is_percent:
        raise ValueError("mixes examples and percent")
    if not slice_match["colon"]:
        if not per_class:
            raise ValueError("names one position, not a slice (a colon is missing)")
        start, stop = None, start
    return Term(text, split, start, stop, per_class)


def _parse_bound(text: str) -> Bound | None:
    if not text:
        return None
    match = _BOUND.fullmatch(text)
    if not match:
        raise ValueError(f"has the bound '{text}', which is neither an integer nor a percentage")
    bound = Bound(float(text.rstrip("%")), True) if match["percent"] else Bound(int(text), False)
    if bound.is_percent and abs(bound.value) > 100:
        raise ValueError(f"has the bound '{text}', outside of -100%..100%")
    return bound


def indices(term: Term, source: Source, seed: int) -> np.ndarray:
    """Returns the examples of `source` that a term selects, int64 [k], in the source's order.

    Raises:
      DataError: the term selects no example, or a bound exceeds the split or one of its classes.
    """
    if term.per_class:
        selected = _per_class_indices(term, source, seed)
    else:
        try:
            selected = np.arange(*term.range(len(source)))
        except IndexError as error:
            raise DataError(
                f"split '{term.text}' exceeds {term.split}, which has {len(source)} images."
            ) from error
    if not len(selected):
        raise DataError(
            f"split '{term.text}' is empty: it selects none of the {len(source)} images of "
            f"{term.split}. Images per class: {class_counts(source)}."
        )
    return selected


def _per_class_indices(term: Term, source: Source, seed: int) -> np.ndarray:
    if is_multi_label(source):
        raise DataError(
            f"split '{term.text}' selects within classes, and each image of {term.split} may have "
            f"several labels: slice by position, such as {term.split}[:80%]."
        )
    slices = []
    for members in class_orders(source, seed):
        try:
            # A class without images in this split contributes none; that is no error.
            start, stop = term.range(len(members)) if len(members) else (0, 0)
        except IndexError as error:
            raise DataError(
                f"split '{term.text}' exceeds some classes of {term.split}. "
                f"Images per class: {class_counts(source)}."
            ) from error
        slices.append(members[start:stop])
    return np.sort(np.concatenate(slices))


def class_orders(source: Source, seed: int) -> list[np.ndarray]:
    """Returns the examples of each class in a seeded order.

    If images may have several labels, returns all examples as one class.

    All draws within classes take a prefix of this order, so that with the same seed a smaller
    draw is a subset of a larger one.
    """
    rng = np.random.default_rng(seed)
    if is_multi_label(source):
        return [rng.permutation(len(source))]
    counts = images_per_class(source)
    by_class = np.argsort(source.targets, kind="stable")
    return [rng.permutation(members) for members in np.split(by_class, np.cumsum(counts)[:-1])]


def class_counts(source: Source) -> str:
    """Returns the first classes with their numbers of images, the smallest class first."""
    counts = images_per_class(source)
    ascending = np.argsort(counts, kind="stable")
    return join_names([f"{source.classes[k]} {counts[k]}" for k in ascending])
