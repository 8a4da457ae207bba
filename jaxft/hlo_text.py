"""Instructions of a compiled program, read from its text."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ((?:\([^=]*?\)|\S+)) ([\w\-]+)\((.*)$")


class Instruction(NamedTuple):
    """One line of an HLO program."""

    name: str
    type: str
    """Such as `bf16[8,128]{1,0}`, or a tuple of types."""
    op: str
    rest: str
    """Operands, attributes and metadata."""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%?([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def op_name(self) -> str:
        """Path of the JAX functions behind the instruction; empty if the compiler made it."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


class Array(NamedTuple):
    """Type and shape of an array."""

    kind: str
    """Such as `bf16`."""
    shape: tuple[int, ...]


Computations = Mapping[str, list[Instruction]]
"""Instructions of each computation of a program, by its name."""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation of an HLO program, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            computations[name].append(Instruction(*match.groups()))
    return computations, entry


def arrays(type_text: str) -> list[Array]:
    """Returns the arrays of a type: one, or those of a tuple."""
    return [
        Array(kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _ARRAY.findall(type_text)
    ]


def elements(type_text: str) -> list[str]:
    """Splits the type of a tuple into the types of its elements."""
    parts, depth = [""], 0
    for character in type_text.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def size_in_bytes(type_text: str) -> int:
    """Returns the bytes of an array's or tuple's type."""
    return sum(_BYTES[kind] * math.prod(shape) for kind, shape in arrays(type_text))


def element_count(type_text: str) -> int:
    """Returns the number of elements of an array's or tuple's type."""
    return sum(math.prod(shape) for _, shape in arrays(type_text))
