"""Cost of a compiled program, read from XLA: operations, bytes, memory, cycles, collectives.

XLA's estimates are deterministic, and for TPUs they need no TPU (`jaxft.topology`), so that they
can be compared and tested.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ((?:\([^=]*?\)|\S+)) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?"
)


class Instruction(NamedTuple):
    """One line of an HLO program."""

    name: str
    type: str
    """Such as `bf16[8,128]{1,0}`, or a tuple of types."""
    op: str
    rest: str
    """Operands, attributes and metadata."""


@dataclass(frozen=True)
class HloCost:
    """Cost of one call of a compiled program on each device.

    Attributes:
      flops: floating-point operations.
      bytes_accessed: bytes that instructions read and write, before caches.
      memory: bytes of arguments, results and temporary arrays, without those that alias.
      temporary: bytes of temporary arrays.
      cycles: XLA's estimate for TPUs, else 0. Counts the cheapest branch of a conditional: a norm
        layer's other branch reads the batch again, if digits of its variance cancel. The body of a
        loop counts once per iteration.
      collectives: number of executed collectives by kind.
      collective_bytes: bytes of their results, by kind.
      convolutions: number of convolutions and dots, by `forward` and `backward`.
      operands: number of convolutions and dots by the types of their operands, `bf16 x bf16`.
      aliases: number of arguments whose memory a result reuses.
    """

    flops: float
    bytes_accessed: float
    memory: int
    temporary: int
    cycles: int
    collectives: dict[str, int]
    collective_bytes: dict[str, int]
    convolutions: dict[str, int]
    operands: dict[str, int]
    aliases: int


def hlo_cost(compiled: Any) -> HloCost:
    """Returns the cost of a program that `jax.jit(...).lower(...).compile()` has compiled."""
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = compiled.as_text()
    computations, entry = parse(text)
    types = {
        instruction.name: instruction.type
        for instructions in computations.values()
        for instruction in instructions
    }
    convolutions, operands = Counter[str](), Counter[str]()
    for instruction in (x for instructions in computations.values() for x in instructions):
        if instruction.op in ("convolution", "dot"):
            is_backward = "transpose(" in _op_name(instruction)
            convolutions["backward" if is_backward else "forward"] += 1
            names = re.findall(r"%?([\w.\-]+)", instruction.rest.partition(")")[0])
            kinds = [found[0][0] for x in names if (found := _ARRAY.findall(types.get(x, "")))]
            operands[" x ".join(kinds[:2])] += 1
    cycles, exchanges = _executed(computations, entry)
    counts, sizes = Counter[str](), Counter[str]()
    for exchange in exchanges.values():
        counts[exchange.kind] += exchange.times
        sizes[exchange.kind] += exchange.times * exchange.bytes
    return HloCost(
        flops=float(analysis.get("flops", 0.0)),
        bytes_accessed=float(analysis.get("bytes accessed", 0.0)),
        memory=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        cycles=cycles,
        collectives=dict(counts),
        collective_bytes=dict(sizes),
        convolutions=dict(convolutions),
        operands=dict(operands),
        aliases=len(re.findall(r"(?:may|must)-alias", text.partition("\n")[0])),
    )


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


class _Exchange(NamedTuple):
    """A collective: its kind, the bytes of its result, and how often it runs."""

    kind: str
    bytes: int
    times: int


def _executed(
    computations: dict[str, list[Instruction]], name: str
) -> tuple[int, dict[str, _Exchange]]:
    """Returns the cycles of one run of a computation, and its collectives by channel.

    A TPU starts a collective within one fusion and ends it within another: both contain it, with
    the same channel.
    """
    cycles, exchanges = 0, dict[str, _Exchange]()
    for instruction in computations.get(name, ()):
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
            cycles += int(estimate[1])
        if collective := _COLLECTIVE.fullmatch(instruction.op):
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel[1] if channel else instruction.name
            # The result of a start is `(operand, result, ...)`, except for an all-reduce.
            is_pair = collective[2] and collective[1] != "all-reduce"
            result = _elements(instruction.type)[1] if is_pair else instruction.type
            kind = collective[1]
            if name.startswith("all-reduce-scatter"):  # and then each device takes its slice
                kind = "reduce-scatter"
            exchanges[key] = _Exchange(kind, _bytes(result), 1)
        for called, times in _calls(instruction, computations):
            inner_cycles, inner = _executed(computations, called)
            cycles += times * inner_cycles
            exchanges |= {key: x._replace(times=times * x.times) for key, x in inner.items()}
    return cycles, exchanges


def _calls(
    instruction: Instruction, computations: dict[str, list[Instruction]]
) -> list[tuple[str, int]]:
    """Returns the computations that an instruction runs, with the number of runs."""
    if instruction.op == "while":
        body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
        return [(body[1], _trips(instruction, computations))] if body else []
    if instruction.op == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        branches = (
            re.findall(r"%?([\w.\-]+)", listed[1])
            if listed
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
        )

        def cost(branch: str) -> tuple[int, int]:
            cycles, exchanges = _executed(computations, branch)
            return cycles, sum(exchange.bytes for exchange in exchanges.values())

        return [(min(branches, key=cost), 1)]
    called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    return [(called[1], 1)] if called else []


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Returns how often a loop runs its body; 1 if the program does not fix it.

    If XLA does not state the number, it is the constant that the condition compares with: loops of
    JAX count from 0.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {
        each.name: int(value[1])
        for each in instructions
        if each.op == "constant" and (value := re.match(r"(\d+)\)", each.rest))
    }
    for each in instructions:
        if each.op == "compare" and "direction=LT" in each.rest:
            names = re.findall(r"%?([\w.\-]+)", each.rest.partition(")")[0])
            return next((constants[name] for name in names if name in constants), 1)
    return 1


def _elements(type_text: str) -> list[str]:
    """Splits the type of a tuple into the types of its elements."""
    elements, depth = [""], 0
    for character in type_text.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _op_name(instruction: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    return match[1] if match else ""


def _bytes(type_text: str) -> int:
    """Returns the bytes of an array's or tuple's type."""
    total = 0
    for kind, dimensions in _ARRAY.findall(type_text):
        count = 1
        for size in filter(None, dimensions.split(",")):
            count *= int(size)
        total += count * _BYTES[kind]
    return total
