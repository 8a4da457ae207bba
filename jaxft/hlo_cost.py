"""Cost of a compiled program, read from XLA: operations, bytes, memory, cycles, collectives.

XLA's estimates are deterministic, and for TPUs they need no TPU (`jaxft.topology`), so that they
can be compared and tested.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxft.hlo_products import Product, product
from jaxft.hlo_text import Computations, Instruction, element_count, elements, parse, size_in_bytes

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?"
)
_MOVES_NOTHING = re.compile(
    r"bitcast|call|conditional|constant|get-tuple-element|parameter|tuple|while|.*-done"
)

_SLICE = re.compile(r"slice|dynamic-slice|gather")


@dataclass(frozen=True)
class HloCost:
    """Cost of one call of a compiled program on each device.

    Attributes:
      flops: floating-point operations; for a GPU that is not there, only those of convolutions and
        matrix products. The body of a loop counts once per iteration.
      bytes_accessed: bytes that instructions read and write, before caches.
      memory: bytes of arguments, results and temporary arrays, without those that alias. The
        working memory of cuDNN comes on top: it chooses its algorithms on the GPU.
      temporary: bytes of temporary arrays.
      cycles: XLA's estimate for TPUs, else 0. Counts the cheapest branch of a conditional: a norm
        layer's other branch reads the batch again, if digits of its variance cancel. The body of a
        loop counts once per iteration.
      collectives: number of executed collectives by kind. `cross-slice` counts the transfers
        between TPU slices, which XLA surrounds by collectives within each slice.
      collective_bytes: bytes of their results, by kind.
      convolutions: number of convolutions and dots, by `forward` and `backward`.
      operands: number of convolutions and dots by the types of their operands, `bf16 x bf16`.
      layouts: number of cuDNN's convolutions by layout, see `jaxft.hlo_products.Product`.
      transposes: number of instructions that only copy an array to another layout.
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
    layouts: dict[str, int]
    transposes: int
    aliases: int


def hlo_cost(compiled: Any) -> HloCost:
    """Returns the cost of a program that `jax.jit(...).lower(...).compile()` has compiled."""
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = compiled.as_text()
    computations, entry = parse(text)
    program = _Program(computations)
    products = program.products.values()
    total, once = program.run(entry), program.run(entry, loops=False)
    counts, sizes = Counter[str](), Counter[str]()
    for exchange in total.exchanges.values():
        counts[exchange.kind] += exchange.times
        sizes[exchange.kind] += exchange.times * exchange.bytes
    return HloCost(
        # XLA counts the body of a loop once, and nothing for a GPU that is not there.
        flops=float(analysis.get("flops", once.flops)) + total.flops - once.flops,
        bytes_accessed=float(analysis.get("bytes accessed", once.bytes)) + total.bytes - once.bytes,
        memory=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        cycles=total.cycles,
        collectives=dict(counts),
        collective_bytes=dict(sizes),
        convolutions=dict(Counter("backward" if x.is_backward else "forward" for x in products)),
        operands=dict(Counter(x.operands for x in products)),
        layouts=dict(Counter(x.layout for x in products if x.layout)),
        transposes=sum(map(_is_transpose, computations[entry])),
        aliases=len(re.findall(r"(?:may|must)-alias", text.partition("\n")[0])),
    )


class _Exchange(NamedTuple):
    """A collective: its kind, the bytes of its result, and how often it runs."""

    kind: str
    bytes: int
    times: int


class _Run(NamedTuple):
    """Cost of one run of a computation; collectives by their channel."""

    cycles: int
    flops: int
    bytes: float
    exchanges: dict[str, _Exchange]


class _Program:
    """A program, whose computations call each other."""

    def __init__(self, computations: Computations):
        self.computations = computations
        every = [x for instructions in computations.values() for x in instructions]
        self.types = {instruction.name: instruction.type for instruction in every}
        found = {instruction.name: product(instruction, self.types) for instruction in every}
        self.products: dict[str, Product] = {name: x for name, x in found.items() if x}

    def run(self, name: str, *, loops: bool = True, fused: bool = False) -> _Run:
        """Returns the cost of one run of a computation.

        A TPU starts a collective within one fusion and ends it within another: both contain it,
        with the same channel.

        Args:
          name: the computation.
          loops: whether the body of a loop counts once per iteration.
          fused: whether it is the computation of a fusion, whose arrays are not in memory.
        """
        cycles = flops = 0
        moved = 0.0
        exchanges: dict[str, _Exchange] = {}
        for instruction in self.computations.get(name, ()):
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
                cycles += int(estimate[1])
            if each := self.products.get(instruction.name):
                flops += each.flops
            if not fused and not _MOVES_NOTHING.fullmatch(instruction.op):
                moved += self._moved(instruction)
            if collective := _COLLECTIVE.fullmatch(instruction.op):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = channel[1] if channel else instruction.name
                exchanges[key] = _exchange(instruction, collective, name)
            if instruction.op == "send" and "xla_megascale" in instruction.rest:
                sent = size_in_bytes(elements(instruction.type)[0])
                exchanges[instruction.name] = _Exchange("cross-slice", sent, 1)
            fusion = instruction.op == "fusion"
            for called, times in _calls(instruction, self):
                inner = self.run(called, loops=loops, fused=fused or fusion)
                times = times if loops else 1
                cycles += times * inner.cycles
                flops += times * inner.flops
                moved += times * inner.bytes
                exchanges |= {
                    key: x._replace(times=times * x.times) for key, x in inner.exchanges.items()
                }
        return _Run(cycles, flops, moved, exchanges)

    def _moved(self, instruction: Instruction) -> float:
        """Returns the bytes that an instruction outside of fusions reads and writes."""
        written = size_in_bytes(instruction.type)
        if _SLICE.fullmatch(instruction.op):
            return 2 * written
        read = [size_in_bytes(self.types.get(name, "")) for name in instruction.operands]
        called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        fused = self.computations.get(called[1], ()) if called else ()
        shares = {x.operands[0]: self._share(x.name, fused) for x in fused if x.op == "parameter"}
        return written + sum(shares.get(str(i), 1) * size for i, size in enumerate(read))

    def _share(self, name: str, fused: Sequence[Instruction]) -> float:
        """Returns the part of an array that the instructions of a fusion read."""
        share = 0.0
        for user in (x for x in fused if name in x.operands):
            if _SLICE.fullmatch(user.op):
                share += element_count(user.type) / element_count(self.types[name])
            elif user.op in ("bitcast", "convert"):
                share += self._share(user.name, fused)
            else:
                return 1.0
        return min(share, 1.0)


def _exchange(instruction: Instruction, collective: re.Match[str], computation: str) -> _Exchange:
    # The result of a start is `(operand, result, ...)`, except for an all-reduce.
    is_pair = collective[2] and collective[1] != "all-reduce"
    result = elements(instruction.type)[1] if is_pair else instruction.type
    # An `all-reduce-scatter` reduces, and then each device takes its slice.
    is_scatter = computation.startswith("all-reduce-scatter")
    return _Exchange("reduce-scatter" if is_scatter else collective[1], size_in_bytes(result), 1)


def _is_transpose(instruction: Instruction) -> bool:
    """Returns whether an instruction, or the fusion that XLA names after its last, transposes."""
    if instruction.op == "fusion":
        return "transpose" in instruction.name
    return instruction.op in ("copy", "transpose")


def _calls(instruction: Instruction, program: _Program) -> list[tuple[str, int]]:
    """Returns the computations that an instruction runs, with the number of runs."""
    if instruction.op == "while":
        body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
        return [(body[1], _trips(instruction, program.computations))] if body else []
    if instruction.op == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        branches = (
            re.findall(r"%?([\w.\-]+)", listed[1])
            if listed
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
        )

        def cost(branch: str) -> tuple[int, int]:
            run = program.run(branch)
            return run.cycles, sum(exchange.bytes for exchange in run.exchanges.values())

        return [(min(branches, key=cost), 1)]
    called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    if instruction.op == "call":
        called = re.search(r"to_apply=%?([\w.\-]+)", instruction.rest)
    return [(called[1], 1)] if called else []


def _trips(loop: Instruction, computations: Computations) -> int:
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
            return next((constants[x] for x in each.operands if x in constants), 1)
    return 1
