"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that need no download."""

import re

import numpy as np

from jaxft.data.arrays import ArraySource
from jaxft.data.source import Collection
from jaxft.errors import DataError


def find(digits: str) -> Collection:
    """Returns the digits as one split named `train`; see `read`."""
    return Collection("digits", ("train",), lambda _: {"train": read(digits)})


def read(digits: str) -> ArraySource:
    """Reads the images of some digits from `sklearn.datasets.load_digits`.

    The original levels 0..16 are scaled to 0..255.

    Args:
      digits: one digit (`3`) or a range that includes both ends (`5-9`).

    Raises:
      DataError: `digits` is neither, or the range is empty.
    """
    match = re.fullmatch(r"([0-9])(?:-([0-9]))?", digits)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise DataError(
            f"digits:{digits} names no digits: give one digit or a rising range "
            "between 0 and 9, such as digits:3 or digits:5-9."
        )
    # Imported here because scikit-learn takes a second to load.
    from sklearn.datasets import load_digits

    levels, targets = load_digits(return_X_y=True)
    selected = (targets >= first) & (targets <= last)
    gray = np.rint(levels[selected] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return ArraySource(
        classes=tuple(str(digit) for digit in range(first, last + 1)),
        images=np.repeat(gray, 3, axis=3),
        targets=(targets[selected] - first).astype(np.int32),
    )
