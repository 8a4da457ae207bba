"""Class names of several splits, compared."""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence

from jaxft.data.split_expressions import shown

_SHOWN = 10


def differences(classes: Mapping[str, Sequence[str]]) -> str:
    """Returns how the class names of splits differ, by the splits' names; "" if they are the same.

    All splits' own names are listed, and pairs of two splits that may mean the same class.
    """
    names = list(classes.values())
    in_all = set.intersection(*map(set, names))
    only = {split: [c for c in found if c not in in_all] for split, found in classes.items()}
    if any(only.values()):
        sides = [f"Only in {split}: {listed(own)}." for split, own in only.items()]
        return " ".join(sides) + _alike(only)
    if any(list(found) != list(names[0]) for found in names):
        return " ".join(
            f"In another order: {split} has {listed(found)}." for split, found in classes.items()
        )
    return ""


def listed(names: Sequence[str]) -> str:
    """Returns the first names, for a message."""
    return shown([_visible(name) for name in names], _SHOWN) if names else "none"


def _alike(only: Mapping[str, Sequence[str]]) -> str:
    (first, own), (second, others), *_ = only.items()
    folded = {_folded(name): name for name in others}
    pairs = []
    for name in own:
        if near := difflib.get_close_matches(_folded(name), folded, n=1, cutoff=0.7):
            pairs.append(f"{_visible(name)} ({first}) and {_visible(folded[near[0]])} ({second})")
    return f" Are these the same: {shown(pairs)}? Then rename one of each." if pairs else ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


def _visible(name: str) -> str:
    """The name, in quotes if it begins or ends with a space."""
    return name if name == name.strip() else repr(name)
