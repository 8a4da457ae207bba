"""What does not fit between a file and a network, all at once and in a few lines."""

from collections.abc import Mapping

from jaxft.errors import first_of
from jaxft.weights.key_maps import TorchTensor
from jaxft.weights.tensors import LazyTensor

_SHOWN = 8  # of each kind of mismatch

FLOATS = ("F16", "BF16", "F32", "F64")
"""The dtypes, as safetensors calls them, that can become float32 weights."""


def mismatch(
    wanted: Mapping[str, TorchTensor], found: Mapping[str, LazyTensor], head: str, prefix: str = ""
) -> str | None:
    """None where every tensor fits, both ways; otherwise a report that ends with a way out.

    `prefix` is what the file's names begin with.
    """
    where = f" below {prefix!r}" if prefix else ""
    missing = wanted.keys() - found.keys()
    extra = found.keys() - wanted.keys()
    both = wanted.keys() & found.keys()
    reshaped = {name for name in both if found[name].shape != wanted[name].shape}
    retyped = {name for name in both if found[name].dtype not in FLOATS}
    wrong = missing | extra | reshaped | retyped
    if not wrong:
        return None
    fit = len(both - reshaped - retyped)
    sections = (
        ("missing", [f"{n} {list(wanted[n].shape)}" for n in sorted(missing)]),
        ("not in the network", [f"{n} {list(found[n].shape)}" for n in sorted(extra)]),
        (
            "of another shape",
            [f"{n} {list(found[n].shape)}, not {list(wanted[n].shape)}" for n in sorted(reshaped)],
        ),
        (
            "of a type that is not F16, BF16, F32 or F64",
            [f"{n} {found[n].dtype}" for n in sorted(retyped)],
        ),
    )
    lines = [f"{fit} of the network's {len(wanted)} tensors fit by name and shape{where}."]
    for title, entries in sections:
        if entries:
            shown = first_of(entries, _SHOWN, "... and {} more")
            lines += [f"  {title} ({len(entries)}):", *(f"    {e}" for e in shown)]
    if not (missing or reshaped or retyped):
        lines.append(
            "  All of the network is there. If the rest does nothing between body and head,\n"
            "  weights.from_state_dict takes the tensors without it."
        )
    elif all(name.startswith(f"{head}.") for name in missing | reshaped | retyped):
        lines.append('  Only the head differs. For training, a new one serves: head="fresh".')
    elif not (missing or extra or reshaped):
        lines.append(
            "  Quantised or other special weights must be saved in a floating-point type first."
        )
    elif fit < len(wanted) / 2 or len(extra) > len(wanted) / 2:
        lines.append("  It may hold another architecture, or this one by other names.")
    return "\n".join(lines)
