"""Finds the state dict in what people save around one."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import WeightsError, first_of
from jaxft.weights.network_prefix import IN_MEMORY, take_prefix
from jaxft.weights.tensors import LazyTensor
from jaxft.weights.torch_format.torch_pickle import Inert

# The first that is there: an averaged copy rather than the last step's, as timm does.
_KNOWN = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params"),
)
_WRAPPERS = ("module", "_orig_mod")  # of DataParallel and of torch.compile
# Of torch.compile, FSDP and activation checkpointing around a part of a network: within its names.
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its `module`
_DEPTH = 3
_SHOWN = 8

_Path = tuple[str, ...]


def unwrap(
    content: Any, source: str, entry: str | None = None, prefix: str | None = None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors by name, and a remark for each thing that was chosen, renamed or left.

    A flat dict of tensors is taken as it is. Of nested ones, that under the first of the known
    names is, averaged copies first, or the only one under any other. What is no tensor in it
    is left, with a remark. A first part that all names share (`module.`, `backbone.`) goes, unless
    what remains were a single layer's.

    source: the file, as errors and remarks call it.
    entry: which dict it is, instead: its key, or keys joined by dots.
    prefix: which tensors of it, instead: those whose names begin with it.

    Raises:
      WeightsError: there is no state dict, or there are several of which none has a known name.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source} holds {_kind(content)}, not a state dict")
    states = _states(content)
    path = _pick(states, source) if entry is None else _named(states, entry, source)
    if path is None:
        raise WeightsError(f"{source} holds no state dict. {_holds(content)}")
    state = states[path]
    remarks = _chosen(content, path, source)
    if wrong := [_quoted(n) for n, x in state.items() if _is_tensor(x) and type(n) is not str]:
        raise WeightsError(f"{source} has tensors whose names are no strings: {_bounded(wrong)}")
    tensors = {name: x for name, x in state.items() if _is_tensor(x)}
    if others := [f"{_quoted(n)} ({_kind(x)})" for n, x in state.items() if n not in tensors]:
        remarks.append(f"left what is no tensor in {source}: {_bounded(others)}")
    if _COUNTER in tensors and all(n.startswith("module.") for n in tensors if n != _COUNTER):
        del tensors[_COUNTER]
        remarks.append(f"left '{_COUNTER}' of {source}, which counts the averaged steps")
        if not tensors:
            raise WeightsError(f"{source} holds no tensor beside '{_COUNTER}'")
    tensors, said = _without_inner_wrappers(tensors, source)
    remarks += said
    shared = _prefix(tensors)
    if prefix is not None:
        inside, said = take_prefix(tensors, prefix, source, shared)
        return inside, [*remarks, *said]
    if shared:
        remarks.append(f"took {shared!r} off each name in {source}")
    stripped = {name.removeprefix(shared): x for name, x in tensors.items()}
    assert len(stripped) == len(tensors)
    return stripped, remarks


def _without_inner_wrappers(
    tensors: dict[str, LazyTensor], source: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors without the names of wrappers around parts of a network, and a remark on them.

    What all names share is left: see `_prefix`.
    """
    shared = _prefix(tensors)
    names = {}
    for name in tensors:
        parts = name.removeprefix(shared).split(".")
        inner = [part for part in parts if part not in _INNER_WRAPPERS]
        names[name] = shared + ".".join(inner)
    changed = [name for name, plain in names.items() if name != plain]
    if not changed or len(set(names.values())) < len(names):
        return tensors, []
    found = [w for w in _INNER_WRAPPERS if any(w in name.split(".") for name in changed)]
    remark = f"took {', '.join(map(repr, found))} out of {len(changed)} names in {source}"
    return {names[name]: x for name, x in tensors.items()}, [remark]


def _states(content: Mapping[Any, Any]) -> dict[_Path, Mapping[Any, Any]]:
    """Every dict that has tensors, by the keys that lead to it."""
    found = {}
    seen = set()  # a dict may hold itself
    level: dict[_Path, Mapping[Any, Any]] = {(): content}
    for _ in range(_DEPTH + 1):
        below = {}
        for path, mapping in level.items():
            if id(mapping) in seen and path[-1] not in _KNOWN:
                continue
            seen.add(id(mapping))
            if any(map(_is_tensor, mapping.values())):
                found[path] = mapping
            for key, x in mapping.items():
                if type(key) is str and isinstance(x, Mapping):
                    below[(*path, key)] = x
        level = below
    return found


def _pick(states: Mapping[_Path, Mapping[Any, Any]], source: str, at: _Path = ()) -> _Path | None:
    """The keys to the dict to take, among those below some keys."""
    below = [path for path in states if path[: len(at)] == at]
    if len(below) < 2:
        return below[0] if below else None
    for name in _KNOWN:
        if any(path[: len(at) + 1] == (*at, name) for path in below):
            return _pick(states, source, (*at, name))
    # A few tensors beside a nested dict are a loss or an accuracy, a few nested an extra state.
    nested = [path for path in below if path != at]
    if at in states and _count(states[at]) > sum(_count(states[path]) for path in nested):
        return at
    if len(nested) == 1:
        return nested[0]
    way_out = f"Say which: {source}#entry={'.'.join(nested[0])}"
    raise WeightsError(
        f"{source} holds several state dicts, and none by a usual name: "
        f"{_bounded(_shown(states, below))}. "
        f"{'Give one of them alone.' if source == IN_MEMORY else way_out}"
    )


def _named(states: Mapping[_Path, Mapping[Any, Any]], entry: str, source: str) -> _Path | None:
    """The keys to the dict that an entry spells, or to the one to take below it."""
    for at in {path[:depth]: None for path in states for depth in range(1, len(path) + 1)}:
        if ".".join(at) == entry:
            return at if at in states else _pick(states, source, at)
    there = _bounded(_shown(states, [path for path in states if path])) or "none"
    raise WeightsError(f"{source} has no state dict as its entry {entry!r}. There is {there}.")


def _chosen(content: Mapping[Any, Any], path: _Path, source: str) -> list[str]:
    if not path:
        return []
    others: list[str] = []
    at: Any = content
    for depth, key in enumerate(path):
        others += [_quoted(".".join((*path[:depth], str(k)))) for k in at if k != key]
        at = at[key]
    also = f", which also holds {_bounded(others)}" if others else ""
    return [f"took {_quoted('.'.join(path))} of {source}{also}"]


def _prefix(names: Iterable[str]) -> str:
    """The longest that all share and that is no layer's own."""
    split = [name.split(".") for name in names]
    depth = 0
    while True:
        rest = [parts[depth:] for parts in split]
        firsts = {parts[0] for parts in rest}
        if len(firsts) > 1 or any(len(parts) < 2 for parts in rest):
            break
        if firsts.isdisjoint(_WRAPPERS) and all(len(parts) == 2 for parts in rest):
            break  # `fc.weight` and `fc.bias`
        depth += 1
    return "".join(f"{part}." for part in split[0][:depth])


def _count(state: Mapping[Any, Any]) -> int:
    return sum(map(_is_tensor, state.values()))


def _shown(states: Mapping[_Path, Mapping[Any, Any]], paths: Iterable[_Path]) -> list[str]:
    return [
        f"{_quoted('.'.join(p)) if p else 'itself'} ({_count(states[p])} tensors)" for p in paths
    ]


def _holds(content: Mapping[Any, Any]) -> str:
    entries = [f"{_quoted(key)} ({_kind(x)})" for key, x in content.items()]
    return f"It holds {_bounded(entries)}" if entries else "It is empty"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict" if value else "an empty dict"
    if isinstance(value, Inert):
        name = value.kind
    else:
        name = "tensor" if _is_tensor(value) else type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor)


def _quoted(key: Any) -> str:
    text = str(key)
    return repr(text[:60]) + ("..." if len(text) > 60 else "")


def _bounded(entries: list[str]) -> str:
    return ", ".join(first_of(entries, _SHOWN, "... and {} more"))
