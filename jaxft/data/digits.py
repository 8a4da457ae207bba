"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that need no download."""

import re

import numpy as np

from jaxft.data.arrays import Arrays
from jaxft.data.source import Collection
from jaxft.errors import DataError


def find(wanted: str) -> Collection:
    """The digits named by `wanted`, as one split named `train`; see `read`."""
    return Collection("digits", ("train",), lambda _: {"train": read(wanted)})


def read(wanted: str) -> Arrays:
    """Reads the digits named by `wanted`: one (`3`) or a range with both its ends (`5-9`).

    Source: `sklearn.datasets.load_digits`; its values 0..16 are spread over 0..255.

    Raises:
      DataError: `wanted` is neither, or its range is empty.
    """
    match = re.fullmatch(r"([0-9])(?:-([0-9]))?", wanted)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise DataError(
            f"digits:{wanted} names no digits: give one digit or a rising range "
            "between 0 and 9, such as digits:3 or digits:5-9."
        )
    # Imported here: scikit-learn takes a second to load, and only this function needs it.
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    kept = (targets >= first) & (targets <= last)
    gray = np.rint(values[kept] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Arrays(
        classes=tuple(str(digit) for digit in range(first, last + 1)),
        images=np.repeat(gray, 3, axis=3),
        targets=(targets[kept] - first).astype(np.int32),
    )
