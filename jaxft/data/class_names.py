"""Class names in messages, and the differences between the class names of splits."""

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_MAX_CLASSES = 10  # class names in one list


def sorted_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Returns the different labels, sorted by name, or by value if all are integers.

    >>> sorted_classes(["10", "9", "10"])
    ('9', '10')
    """
    names = set(labels)
    is_number = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if is_number else 0, name)))


def describe_differences(classes: Mapping[str, Sequence[str]]) -> str:
    """Returns how the class names of splits differ, or "" if they are equal.

    Lists the names that are not in all splits, and pairs of names that may mean the same class.

    Args:
      classes: class names by split.
    """
    all_names = list(classes.values())
    common = set.intersection(*map(set, all_names))
    extra = {split: [c for c in names if c not in common] for split, names in classes.items()}
    if any(extra.values()):
        lists = [f"Only in {split}: {list_classes(names)}." for split, names in extra.items()]
        return " ".join(lists) + _similar_names(extra)
    if any(list(names) != list(all_names[0]) for names in all_names):
        return " ".join(
            f"In another order: {split} has {list_classes(names)}."
            for split, names in classes.items()
        )
    return ""


def list_classes(names: Sequence[str]) -> str:
    """Returns the first class names, or "none"."""
    return join_names([_quote_spaces(name) for name in names], _MAX_CLASSES) if names else "none"


def join_names(names: Sequence[str], limit: int = 5) -> str:
    """Returns the first names, separated by commas, with an ellipsis if there are more.

    >>> join_names("abcdef", 3)
    'a, b, c, ...'
    """
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _similar_names(extra: Mapping[str, Sequence[str]]) -> str:
    (first, names), (second, other_names), *_ = extra.items()
    folded = {_fold(name): name for name in other_names}
    pairs = []
    for name in names:
        if close := difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.7):
            other = folded[close[0]]
            pairs.append(f"{_quote_spaces(name)} ({first}) and {_quote_spaces(other)} ({second})")
    if not pairs:
        return ""
    return f" Are these the same: {join_names(pairs)}? Then rename one of each."


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


def _quote_spaces(name: str) -> str:
    """Returns the name, in quotes if it starts or ends with a space."""
    return name if name == name.strip() else repr(name)
