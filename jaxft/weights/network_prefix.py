"""Finds a network among the tensors of a file that holds more than it."""

from collections import Counter
from collections.abc import Iterable, Mapping

from jaxft.errors import WeightsError, first_of
from jaxft.weights.families import rename
from jaxft.weights.tensors import LazyTensor

IN_MEMORY = "the state dict"
"""What errors call a state dict that is no file."""
Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 8


def take_prefix(
    tensors: Mapping[str, LazyTensor], prefix: str, source: str, common: str = ""
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Returns the tensors whose names begin with `prefix`, without it, and what to say of the rest.

    `common` may be left out of the prefix: all names begin with it. Raises WeightsError where no
    name begins so.
    """
    wanted = prefix.removesuffix(".") + "."
    for start in (wanted, common + wanted):
        if inside := {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}:
            outside = [name for name in tensors if not name.startswith(start)]
            return inside, [taken(source, start, len(inside), outside)]
    raise WeightsError(f"{source}: no name begins with {wanted!r}. There are {grouped(tensors)}.")


def find_prefix(
    tensors: Mapping[str, LazyTensor], body: Shapes, source: str, *, own_names: bool
) -> str:
    """Returns the prefix below which the tensors of `body` are, by name and shape; '' at the root.

    Where there is none with all of them, one with most of them, or else the root.

    Raises:
      WeightsError: there are several below which all are, and they are not at the root.
    """
    fitting = Counter[str]({"": 0})
    for name, tensor in tensors.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            if body.get(rest if own_names else rename(rest)) == tensor.shape:
                fitting["".join(f"{part}." for part in parts[:depth])] += 1
    whole = [prefix for prefix, count in fitting.items() if count >= len(body)]
    if "" in whole or not body:
        return ""
    if len(whole) > 1:
        counts = [f"{p!r} ({sum(n.startswith(p) for n in tensors)} tensors)" for p in whole]
        separator = "&" if "#" in source else "#"
        way_out = f"Say which: {source}{separator}prefix={whole[0]}"
        if source == IN_MEMORY:
            way_out = "Give the tensors of one of them alone."
        raise WeightsError(
            f"{source} holds the network below {len(whole)} prefixes: {', '.join(counts)}. "
            f"{way_out}"
        )
    best, count = fitting.most_common(1)[0]
    return best if count > len(body) / 2 else ""


def find_head(
    tensors: Mapping[str, LazyTensor], head: Shapes, *, own_names: bool
) -> dict[str, str] | None:
    """Returns the name of each of a head's tensors among those beside the body.

    None unless all of them are found, by name and shape, in one place alone.
    """
    places: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            target = rest if own_names else rename(rest)
            if head.get(target) == tensor.shape:
                places.setdefault(".".join(parts[:depth]), {})[target] = name
    whole = [place for place in places.values() if len(place) == len(head)]
    return whole[0] if len(whole) == 1 else None


def taken(source: str, prefix: str, count: int, others: Iterable[str]) -> str:
    """Says which tensors were taken, and counts the rest."""
    others = list(others)
    where = f" below {prefix!r}" if prefix else ""
    left = f", and left {len(others)} beside them: {grouped(others)}" if others else ""
    return f"Took the {count} tensors{where} in {source}{left}."


def grouped(names: Iterable[str]) -> str:
    """Lists the first parts of names, with the number of names that begin with each."""
    firsts = Counter(name.partition(".")[0] + ".*" * ("." in name) for name in names)
    entries = (f"{first} ({n})" for first, n in firsts.most_common())
    return ", ".join(first_of(entries, _SHOWN, "... and {} more")) or "none"
