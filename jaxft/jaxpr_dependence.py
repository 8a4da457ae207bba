"""Finds out which inputs of a traced function each of its outputs depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

_MARK = "jaxft mark "
# Calls of a function, with the inputs and outputs of their jaxpr.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
    *("custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint"),
}


@dataclass
class Dependence:
    """Dependences of a jaxpr's outputs, as sets of bits.

    Bit `i` stands for input `i` of the function. Each value that `mark` named is a further input:
    bit `num_inputs + k` for the mark of index `k` in `marks`.

    Attributes:
      num_inputs: number of inputs, counted as leaves.
      outputs: the inputs that reach each output.
      marks: name of each mark outside of nested jaxprs, and the inputs that reach the marked value,
        in the order of the calls.
    """

    num_inputs: int
    outputs: list[int] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)


def mark(x: Any, name: str) -> Any:
    """Returns `x`; `dependence` reports the inputs that reach it, and treats it as an input."""
    return checkpoint_name(x, _MARK + name)


def dependence(closed: ClosedJaxpr) -> Dependence:
    """Returns the dependences of a function, traced by `jax.make_jaxpr`.

    Values of an equation are told apart only in calls of functions and in scans. Otherwise each
    output of an equation counts as dependent on all of its inputs.
    """
    found = Dependence(len(closed.jaxpr.invars))
    found.outputs = _outputs(closed.jaxpr, [1 << i for i in range(found.num_inputs)], found)
    return found


def _outputs(jaxpr: Jaxpr, inputs: Sequence[int], found: Dependence | None = None) -> list[int]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else known.get(atom, 0)

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        name = equation.params.get("name") if equation.primitive.name == "name" else None
        if found and isinstance(name, str) and name.startswith(_MARK):
            results = [1 << (found.num_inputs + len(found.marks))]
            found.marks.append((name.removeprefix(_MARK), values[0]))
        else:
            results = _equation_outputs(equation, values)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation_outputs(equation: Any, values: list[int]) -> list[int]:
    inner = list(jaxprs_in_params(equation.params))
    if len(inner) == 1 and len(inner[0].invars) == len(values):
        if equation.primitive.name in _CALLS:
            return _outputs(inner[0], values)
        if equation.primitive.name == "scan":
            return _scan_outputs(equation, inner[0], values)
    return [reduce(or_, values, 0)] * len(equation.outvars)


def _scan_outputs(equation: Any, body: Jaxpr, values: list[int]) -> list[int]:
    """Runs the body until the dependences of its carry no longer grow."""
    # Constants and the carry have no axis of steps. Names of the parameters that count them differ
    # between versions of jax.
    num_xs = _num_stacked(equation.invars, body.invars)
    count = len(equation.outvars) - _num_stacked(equation.outvars, body.outvars)
    start = len(values) - num_xs - count
    while True:
        results = _outputs(body, values)
        carry = [a | b for a, b in zip(values[start : start + count], results, strict=False)]
        if carry == values[start : start + count]:
            return [*carry, *results[count:]]
        values = [*values[:start], *carry, *values[start + count :]]


def _num_stacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """Returns the number of values that have one axis more outside of a scan's body."""
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))
