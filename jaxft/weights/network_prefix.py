"""Finds a network below a prefix of tensor names, as in a file that holds more than the network."""

from collections import Counter
from collections.abc import Iterable, Mapping

from jaxft.errors import WeightsError, first_of
from jaxft.models.key_map import KeyMap
from jaxft.weights.key_maps import squeezed
from jaxft.weights.tensors import LazyTensor

IN_MEMORY = "the state dict"
"""Name, in messages, of a state dict in memory."""
Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 8


def select_prefix(
    tensors: Mapping[str, LazyTensor], prefix: str, source: str, common: str = ""
) -> tuple[dict[str, LazyTensor], str]:
    """Selects the tensors whose names begin with `prefix`.

    Args:
      tensors: Tensors by name.
      prefix: Prefix, with or without a dot at the end.
      source: Name of the weights, for messages.
      common: Prefix of all names, which `prefix` may leave out.

    Returns:
      The selected tensors without the prefix, and a remark on the others.

    Raises:
      WeightsError: No name begins with the prefix.
    """
    dotted = prefix.removesuffix(".") + "."
    for start in (dotted, common + dotted):
        if selected := {
            name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)
        }:
            ignored = [name for name in tensors if not name.startswith(start)]
            return selected, selection_remark(source, start, len(selected), ignored)
    raise WeightsError(
        f"{source}: no name begins with {dotted!r}. There are {_count_first_parts(tensors)}."
    )


def find_prefix(
    tensors: Mapping[str, LazyTensor], body: Shapes, source: str, key_map: KeyMap | None
) -> str:
    """Finds the prefix below which all tensors of the network's body are, by name and shape.

    Args:
      tensors: Tensors by name.
      body: Shapes of the body's tensors by name.
      source: Name of the weights, for messages.
      key_map: The network's key map; None compares the names as they are.

    Returns:
      The prefix; "" if the body is at the root. If none has all tensors, the prefix that has most
      of them, or "" if none has more than half.

    Raises:
      WeightsError: Several prefixes have all tensors, and the root does not.
    """
    matches = Counter[str]({"": 0})
    for name, tensor in tensors.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            shape = body.get(key_map.rename(rest) if key_map else rest)
            if shape is not None and squeezed(shape) == squeezed(tensor.shape):
                matches["".join(f"{part}." for part in parts[:depth])] += 1
    complete = [prefix for prefix, count in matches.items() if count >= len(body)]
    if "" in complete or not body:
        return ""
    if len(complete) > 1:
        counts = [f"{p!r} ({sum(n.startswith(p) for n in tensors)} tensors)" for p in complete]
        separator = "&" if "#" in source else "#"
        remedy = f"Choose one: {source}{separator}prefix={complete[0]}"
        if source == IN_MEMORY:
            remedy = "Pass the tensors of one of them alone."
        raise WeightsError(
            f"{source} holds the network below {len(complete)} prefixes: {', '.join(counts)}. "
            f"{remedy}"
        )
    best, count = matches.most_common(1)[0]
    return best if count > len(body) / 2 else ""


def find_head(
    tensors: Mapping[str, LazyTensor], head: Shapes, key_map: KeyMap | None
) -> dict[str, str] | None:
    """Finds the head's tensors, by name and shape, among the tensors outside the body.

    Args:
      tensors: Tensors by name.
      head: Shapes of the head's tensors by name.
      key_map: The network's key map; None compares the names as they are.

    Returns:
      Name in `tensors` for each name in `head`, or None unless exactly one prefix has all of them.
    """
    by_prefix: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            target = key_map.rename(rest) if key_map else rest
            if head.get(target) == tensor.shape:
                by_prefix.setdefault(".".join(parts[:depth]), {})[target] = name
    complete = [names for names in by_prefix.values() if len(names) == len(head)]
    return complete[0] if len(complete) == 1 else None


def selection_remark(source: str, prefix: str, count: int, ignored: Iterable[str]) -> str:
    """Returns the remark that states which tensors were used, and counts the ignored ones."""
    ignored = list(ignored)
    place = f" below {prefix!r}" if prefix else ""
    rest = ""
    if ignored:
        rest = f", and ignored the rest ({len(ignored)}): {_count_first_parts(ignored)}"
    return f"Used the {count} tensors{place} in {source}{rest}."


def _count_first_parts(names: Iterable[str]) -> str:
    """Lists the first parts of names, with the number of names that begin with each."""
    counts = Counter(name.partition(".")[0] + ".*" * ("." in name) for name in names)
    entries = (f"{first} ({count})" for first, count in counts.most_common())
    return ", ".join(first_of(entries, _SHOWN, "... and {} more")) or "none"
