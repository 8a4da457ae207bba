"""What the rest of the house sees of a data set, and how a spec such as `folder:PATH` opens one."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from jaxft.data import digits, folder
from jaxft.errors import DataError

_KINDS = {
    "digits": "digits, or some of them: digits:5-9",
    "folder": "folder:PATH with PATH/train/<class>/ and PATH/val/<class>/",
}


class Source(Protocol):
    """Images with their classes, by index. It may be read from several threads at once."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a target is an index into them."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """All targets, int32 [n], without decoding an image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target."""
        ...


class Splits(NamedTuple):
    """The two sources of a run."""

    train: Source
    val: Source


def open_source(spec: str, *, shots: int | None = None, seed: int = 0) -> Splits:
    """Opens the data that `spec` names and checks all of it, so that a run cannot die of it later.

    - `digits`, `digits:5-9`, `digits:3`: scikit-learn's 8x8 digits, those classes only. A
      stratified 80 % trains; with `shots`, that many of each class train. The rest is val.
    - `folder:PATH`: PATH/train/<class>/ and PATH/val/<class>/ hold jpg, jpeg, png, bmp or webp
      files. With `shots`, that many of each class of train are used; val stays whole.

    The choice depends on `seed` alone, and with one seed fewer shots are a subset of more.

    Raises:
      DataError: the spec is wrong, or the data missing, incomplete or unreadable.
    """
    kind, colon, place = spec.partition(":")
    if shots is not None and shots < 1:
        raise DataError(f"shots={shots}: give at least 1 image per class, or None to use them all.")
    if kind == "digits":
        whole = digits.read(place if colon else "0-9")
        # At least one of each class is left to validate with.
        chosen = _choose(whole, shots, seed, leave=1)
        rest = np.setdiff1d(np.arange(len(whole)), chosen)
        return Splits(whole.take(chosen), whole.take(rest))
    if kind == "folder":
        train, val = folder.read(place)
        if shots is not None:
            train = train.take(_choose(train, shots, seed, leave=0))
        folder.check_readable((*train.files, *val.files))
        return Splits(train, val)

    near = difflib.get_close_matches(kind.lower(), _KINDS, n=1)
    if spec and Path(spec).is_dir():
        guess = f" Did you mean 'folder:{spec}'?"
    else:
        guess = f" Did you mean '{near[0]}{colon}{place}'?" if near else ""
    kinds = "".join(f"\n  {usage}" for usage in _KINDS.values())
    raise DataError(f"unknown data '{spec}'.{guess} Data is one of:{kinds}")


def _choose(source: Source, shots: int | None, seed: int, *, leave: int) -> np.ndarray:
    """Sorted indices of `shots` examples of each class, or of 80 % of each class without."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    if shots is not None and shots > counts.min() - leave:
        raise DataError(
            f"shots={shots} is too many: each class allows at most {counts.min() - leave}"
            + (f" ({leave} must remain for validation)" if leave else "")
            + f". Images per class: {_tally(source.classes, counts)}."
        )
    rng = np.random.default_rng(seed)
    chosen = []
    for target, count in enumerate(counts):
        # The whole class is permuted whatever is asked for, so that fewer shots are a subset.
        members = rng.permutation(np.flatnonzero(source.targets == target))
        chosen.append(members[: round(0.8 * count) if shots is None else shots])
    return np.sort(np.concatenate(chosen))


def _tally(classes: Sequence[str], counts: np.ndarray) -> str:
    """The scarcest classes first, since they are what limits."""
    order = np.argsort(counts, kind="stable")
    named = [f"{classes[k]} {counts[k]}" for k in order[:5]]
    return ", ".join(named) + (", ..." if len(order) > 5 else "")
