"""Finds the state dict in a checkpoint, and removes the prefixes of wrappers from its names."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import WeightsError, first_of
from jaxft.weights.network_prefix import IN_MEMORY, select_prefix
from jaxft.weights.tensors import LazyTensor
from jaxft.weights.torch_format.torch_pickle import OpaqueObject

# In order of preference. As in timm, averaged weights come before the last weights.
_STATE_DICT_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params"),
)
_OUTER_WRAPPERS = ("module", "_orig_mod")  # DataParallel, torch.compile
# torch.compile, FSDP and activation checkpointing, applied to parts of a network.
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_SWA_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, next to its `module`
_MAX_DEPTH = 3
_SHOWN = 8

_Path = tuple[str, ...]
"""Keys that lead to a nested dict."""
_StateDicts = dict[_Path, Mapping[Any, Any]]


def unwrap(
    content: Any, source: str, entry: str | None = None, prefix: str | None = None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Finds the state dict in the content of a file, and removes wrappers from its names.

    A flat dict of tensors is used as it is. Among nested dicts, the first that has a usual name is
    used (averaged weights first), or else the only one. Values that are not tensors are ignored.
    A prefix that all names share (`module.`, `backbone.`) is removed, unless it is the name of a
    single layer.

    Args:
      content: Content of the file.
      source: Name of the file, for messages.
      entry: Key of the state dict, or several keys joined by dots.
      prefix: Prefix of the names of the wanted tensors.

    Returns:
      The tensors by name, and a remark per choice, renaming or omission.

    Raises:
      WeightsError: There is no state dict, or there are several without a usual name.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source} holds {_type_name(content)}, not a state dict")
    state_dicts = _find_state_dicts(content)
    if entry is None:
        path = _choose(state_dicts, source)
    else:
        path = _find_entry(state_dicts, entry, source)
    if path is None:
        raise WeightsError(f"{source} holds no state dict. {_describe_content(content)}")
    tensors, remarks = _select_tensors(state_dicts[path], source)
    remarks = [*_choice_remark(content, path, source), *remarks]
    tensors, inner_remarks = _remove_inner_wrappers(tensors, source)
    remarks += inner_remarks
    common = _common_prefix(tensors)
    if prefix is not None:
        selected, remark = select_prefix(tensors, prefix, source, common)
        return selected, [*remarks, remark]
    if common:
        remarks.append(f"removed {common!r} from each name in {source}")
    stripped = {name.removeprefix(common): x for name, x in tensors.items()}
    assert len(stripped) == len(tensors)
    return stripped, remarks


def _select_tensors(
    state_dict: Mapping[Any, Any], source: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Returns the tensors of a state dict, and remarks on its other values."""
    remarks = []
    unnamed = [n for n, x in state_dict.items() if _is_tensor(x) and type(n) is not str]
    if unnamed:
        names = _join([_quote(name) for name in unnamed])
        raise WeightsError(f"{source} has tensors whose names are not strings: {names}")
    tensors = {name: x for name, x in state_dict.items() if _is_tensor(x)}
    if others := [
        f"{_quote(n)} ({_type_name(x)})" for n, x in state_dict.items() if n not in tensors
    ]:
        remarks.append(f"ignored values of {source} that are not tensors: {_join(others)}")
    if _SWA_COUNTER in tensors and all(
        name.startswith("module.") for name in tensors if name != _SWA_COUNTER
    ):
        del tensors[_SWA_COUNTER]
        remarks.append(f"ignored '{_SWA_COUNTER}' of {source}, the number of averaged steps")
        if not tensors:
            raise WeightsError(f"{source} holds no tensor except '{_SWA_COUNTER}'")
    return tensors, remarks


def _remove_inner_wrappers(
    tensors: dict[str, LazyTensor], source: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Removes the wrappers around parts of a network from the names, and remarks on it.

    The common prefix of all names stays; `unwrap` removes it.
    """
    common = _common_prefix(tensors)
    targets = {}
    for name in tensors:
        parts = name.removeprefix(common).split(".")
        targets[name] = common + ".".join(part for part in parts if part not in _INNER_WRAPPERS)
    changed = [name for name, target in targets.items() if name != target]
    if not changed or len(set(targets.values())) < len(targets):
        return tensors, []
    wrappers = [w for w in _INNER_WRAPPERS if any(w in name.split(".") for name in changed)]
    names = ", ".join(map(repr, wrappers))
    remark = f"removed {names} from {len(changed)} names in {source}"
    return {targets[name]: x for name, x in tensors.items()}, [remark]


def _find_state_dicts(content: Mapping[Any, Any]) -> _StateDicts:
    """Returns all nested dicts that directly hold tensors, by their path."""
    state_dicts = {}
    visited = set()  # a dict may contain itself
    level: _StateDicts = {(): content}
    for _ in range(_MAX_DEPTH + 1):
        next_level = {}
        for path, mapping in level.items():
            if id(mapping) in visited and path[-1] not in _STATE_DICT_KEYS:
                continue
            visited.add(id(mapping))
            if any(map(_is_tensor, mapping.values())):
                state_dicts[path] = mapping
            for key, value in mapping.items():
                if type(key) is str and isinstance(value, Mapping):
                    next_level[(*path, key)] = value
        level = next_level
    return state_dicts


def _choose(state_dicts: _StateDicts, source: str, root: _Path = ()) -> _Path | None:
    """Chooses one of the state dicts at or below `root`."""
    candidates = [path for path in state_dicts if path[: len(root)] == root]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    for key in _STATE_DICT_KEYS:
        if any(path[: len(root) + 1] == (*root, key) for path in candidates):
            return _choose(state_dicts, source, (*root, key))
    # A few tensors next to a nested dict are metrics. A few nested ones are a module's extra state.
    nested = [path for path in candidates if path != root]
    if root in state_dicts:
        num_nested = sum(_num_tensors(state_dicts[path]) for path in nested)
        if _num_tensors(state_dicts[root]) > num_nested:
            return root
    if len(nested) == 1:
        return nested[0]
    remedy = f"Choose one: {source}#entry={'.'.join(nested[0])}"
    raise WeightsError(
        f"{source} holds several state dicts, and none by a usual name: "
        f"{_list_paths(state_dicts, candidates)}. "
        f"{'Pass one of them alone.' if source == IN_MEMORY else remedy}"
    )


def _find_entry(state_dicts: _StateDicts, entry: str, source: str) -> _Path | None:
    """Returns the path of an entry, or of the state dict to use below it."""
    prefixes = {path[:depth]: None for path in state_dicts for depth in range(1, len(path) + 1)}
    for path in prefixes:
        if ".".join(path) == entry:
            return path if path in state_dicts else _choose(state_dicts, source, path)
    entries = _list_paths(state_dicts, [path for path in state_dicts if path]) or "none"
    raise WeightsError(f"{source} has no state dict as its entry {entry!r}. There is {entries}.")


def _choice_remark(content: Mapping[Any, Any], path: _Path, source: str) -> list[str]:
    """Returns a remark on the chosen entry and the others, unless the file is a flat dict."""
    if not path:
        return []
    others: list[str] = []
    mapping: Any = content
    for depth, key in enumerate(path):
        others += [_quote(".".join((*path[:depth], str(k)))) for k in mapping if k != key]
        mapping = mapping[key]
    rest = f", which also holds {_join(others)}" if others else ""
    return [f"used {_quote('.'.join(path))} of {source}{rest}"]


def _common_prefix(names: Iterable[str]) -> str:
    """Returns the longest prefix that all names share and that is not a single layer's name."""
    split_names = [name.split(".") for name in names]
    depth = 0
    while True:
        rests = [parts[depth:] for parts in split_names]
        first_parts = {parts[0] for parts in rests}
        if len(first_parts) > 1 or any(len(parts) < 2 for parts in rests):
            break
        if first_parts.isdisjoint(_OUTER_WRAPPERS) and all(len(parts) == 2 for parts in rests):
            break  # a single layer, such as `fc.weight` and `fc.bias`
        depth += 1
    return "".join(f"{part}." for part in split_names[0][:depth])


def _num_tensors(state_dict: Mapping[Any, Any]) -> int:
    return sum(map(_is_tensor, state_dict.values()))


def _list_paths(state_dicts: _StateDicts, paths: Iterable[_Path]) -> str:
    return _join(
        [
            f"{_quote('.'.join(path)) if path else 'itself'} "
            f"({_num_tensors(state_dicts[path])} tensors)"
            for path in paths
        ]
    )


def _describe_content(content: Mapping[Any, Any]) -> str:
    entries = [f"{_quote(key)} ({_type_name(x)})" for key, x in content.items()]
    return f"It holds {_join(entries)}" if entries else "It is empty"


def _type_name(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict" if value else "an empty dict"
    if isinstance(value, OpaqueObject):
        name = value.type_name
    else:
        name = "tensor" if _is_tensor(value) else type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor)


def _quote(key: Any) -> str:
    text = str(key)
    return repr(text[:60]) + ("..." if len(text) > 60 else "")


def _join(entries: list[str]) -> str:
    return ", ".join(first_of(entries, _SHOWN, "... and {} more"))
