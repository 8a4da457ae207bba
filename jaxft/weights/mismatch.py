"""Reports all differences between the tensors of a file and the tensors of a network."""

from collections.abc import Mapping

from jaxft.errors import first_of
from jaxft.weights.key_maps import TorchTensor
from jaxft.weights.tensors import LazyTensor

_SHOWN = 8  # tensors per kind of mismatch

FLOATS = ("F16", "BF16", "F32", "F64")
"""Dtypes, as safetensors names them, that can be cast to float32 weights."""


def mismatch(
    expected: Mapping[str, TorchTensor],
    tensors: Mapping[str, LazyTensor],
    head: str,
    prefix: str = "",
) -> str | None:
    """Compares names, shapes and dtypes.

    Args:
      expected: Tensors of the network, by name.
      tensors: Tensors of the file, by name.
      head: Path of the network's head.
      prefix: Prefix of the names in the file, for the report.

    Returns:
      A report that ends with a remedy, or None if everything matches.
    """
    place = f" below {prefix!r}" if prefix else ""
    missing = expected.keys() - tensors.keys()
    extra = tensors.keys() - expected.keys()
    common = expected.keys() & tensors.keys()
    reshaped = {name for name in common if tensors[name].shape != expected[name].shape}
    retyped = {name for name in common if tensors[name].dtype not in FLOATS}
    if not (missing or extra or reshaped or retyped):
        return None
    num_fitting = len(common - reshaped - retyped)
    sections = (
        ("missing", [f"{n} {list(expected[n].shape)}" for n in sorted(missing)]),
        ("not in the network", [f"{n} {list(tensors[n].shape)}" for n in sorted(extra)]),
        (
            "of another shape",
            [
                f"{n} {list(tensors[n].shape)}, not {list(expected[n].shape)}"
                for n in sorted(reshaped)
            ],
        ),
        (
            "of a type that is not F16, BF16, F32 or F64",
            [f"{n} {tensors[n].dtype}" for n in sorted(retyped)],
        ),
    )
    lines = [
        f"{num_fitting} of the network's {len(expected)} tensors fit by name and shape{place}."
    ]
    for title, entries in sections:
        if entries:
            shown = first_of(entries, _SHOWN, "... and {} more")
            lines += [f"  {title} ({len(entries)}):", *(f"    {e}" for e in shown)]
    if not (missing or reshaped or retyped):
        lines.append(
            "  All of the network is there. If the others do nothing between body and head,\n"
            "  remove them, and pass the tensors to weights.from_state_dict."
        )
    elif all(name.startswith(f"{head}.") for name in missing | reshaped | retyped):
        lines.append('  Only the head differs. For training, use a new one: head="fresh".')
    elif not (missing or extra or reshaped):
        lines.append(
            "  Quantised or other special weights must be saved in a floating-point type first."
        )
    elif num_fitting < len(expected) / 2 or len(extra) > len(expected) / 2:
        lines.append("  It may hold another architecture, or this one by other names.")
    return "\n".join(lines)
