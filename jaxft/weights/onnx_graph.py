"""Converts a traced function to an ONNX graph, for the operations of networks in evaluation.

The function is traced for a batch of `BATCH` images, a large prime number. An axis whose size is a
multiple of it belongs to the batch, so that the graph takes batches of any size. (With a symbolic
size, as for `jax.export`, jax would convert slices to gathers.) Operations on constants are
computed by jax here; `jaxft.weights.onnx_operations` converts the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxft.errors import ModelError

OPSET = 18
"""Version of the operators; with `IR_VERSION`, ONNX Runtime 1.14 and newer run the graph."""

IR_VERSION = 8

BATCH = 1_000_003
"""Batch size while tracing."""

Value = np.ndarray | str
"""A constant, or the name of a value in the graph."""

# Primitives that only call the function in this parameter.
_CALLS = {
    "jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "remat2": "jaxpr",
}  # fmt: skip

# Branches of `jax.lax.platform_dependent` for GPUs use XLA's convolutions and windows, which have
# counterparts in ONNX.
_PLATFORM = "cuda"


class UnsupportedError(Exception):
    """An operation that the converter lacks."""


class Graph:
    """Nodes and constants of an ONNX graph.

    Attributes:
      nodes: the nodes, in order.
      constants: the constants, as ONNX tensors.
      scope: path of the module whose operations are converted; the prefix of new names.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.scope = ""

    def add(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node with one output; returns the output's name."""
        return self.add_split(operator, *inputs, count=1, **attributes)[0]

    def add_split(self, operator: str, *inputs: Value, count: int, **attributes: Any) -> list[str]:
        """Adds a node with several outputs; returns their names."""
        from onnx import helper

        names = [self._name(value) for value in inputs]
        name = f"{self.scope}/{operator}_{len(self.nodes)}"
        outputs = [name, *(f"{name}_{i}" for i in range(1, count))]
        self.nodes.append(helper.make_node(operator, names, outputs, name, **attributes))
        return outputs

    def _name(self, value: Value) -> str:
        from onnx import numpy_helper

        if isinstance(value, str):
            return value
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """Permutes the axes of a value."""
        if isinstance(value, np.ndarray):
            return value.transpose(axes)
        return self.add("Transpose", value, perm=list(axes))

    def shape(self, sizes: Sequence[int]) -> Value:
        """Returns a shape as int64: a constant, or computed at run time from the batch size."""
        if not any(map(depends_on_batch, sizes)):
            return np.array(sizes, np.int64)
        batch = self.add("Shape", "images", start=0, end=1)
        parts = [
            self.add("Mul", batch, np.array([size // BATCH]))
            if depends_on_batch(size)
            else np.array([size])
            for size in sizes
        ]
        return self.add("Concat", *parts, axis=0)


def depends_on_batch(size: int) -> bool:
    """Returns whether an axis of this size contains the batch."""
    return size > 0 and size % BATCH == 0


def convert(
    function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct, name: str
) -> bytes:
    """Converts a function to an ONNX model with the input `images` and the output `logits`.

    Args:
      function: maps images to logits.
      images: shape and dtype of the images; the first axis has the size `BATCH`.
      name: name of the network.

    Raises:
      ModelError: an operation is not supported; the message names it and the module.
    """
    from onnx import checker, helper

    closed, graph = jax.make_jaxpr(function)(images), Graph()
    (logits,) = _inline(graph, closed.jaxpr, closed.consts, ["images"], name)
    graph.add("Identity", logits)
    graph.nodes[-1].output[0] = "logits"

    def describe(name: str, aval: Any) -> Any:
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
        sizes = ["batch" if depends_on_batch(size) else size for size in aval.shape]
        return helper.make_tensor_value_info(name, dtype, sizes)

    inputs, outputs = describe("images", images), describe("logits", closed.out_avals[0])
    model = helper.make_model(
        helper.make_graph(graph.nodes, name, [inputs], [outputs], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jaxft",
    )
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _inline(
    graph: Graph, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Value], scope: str
) -> list[Value]:
    """Converts the equations of a function; returns its results."""
    values: dict[core.Var, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))

    def read(variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            aval: Any = variable.aval
            return np.asarray(variable.val, aval.dtype)
        return values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        graph.scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        try:
            results = _convert(graph, equation, operands)
        except UnsupportedError as error:
            message = f"{graph.scope} cannot be exported to ONNX: it uses {error}."
            raise ModelError(message) from error
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _convert(graph: Graph, equation: Any, operands: Sequence[Value]) -> Sequence[Value]:
    """Converts one operation; returns its results."""
    from jaxft.weights.onnx_operations import COMPOSED, CONVERTERS

    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        branches = enumerate(params["platforms"])  # the last one is None, for all other platforms
        return [np.array(next(i for i, each in branches if each is None or _PLATFORM in each))]
    if name == "cond" and isinstance(operands[0], np.ndarray):
        function, operands = params["branches"][int(operands[0])], operands[1:]
        return _inline(graph, function.jaxpr, function.consts, operands, graph.scope)
    if name in _CALLS:
        function = params[_CALLS[name]]
        jaxpr, consts = getattr(function, "jaxpr", function), getattr(function, "consts", ())
        return _inline(graph, jaxpr, consts, operands, graph.scope)
    if _is_constant(equation, operands):
        results = equation.primitive.bind(*map(jax.numpy.asarray, operands), **params)
        return [*map(np.asarray, results if equation.primitive.multiple_results else [results])]
    if name in COMPOSED:
        closed = jax.make_jaxpr(COMPOSED[name])(*(variable.aval for variable in equation.invars))
        return _inline(graph, closed.jaxpr, closed.consts, operands, graph.scope)
    if name not in CONVERTERS:
        raise UnsupportedError(f"the operation {name}")
    converted: Any = CONVERTERS[name](graph, equation, *operands)
    return converted if isinstance(converted, list | tuple) else [converted]


def _is_constant(equation: Any, operands: Sequence[Value]) -> bool:
    """Returns whether all operands are constants and no result has an axis of the batch."""
    shapes = (variable.aval.shape for variable in equation.outvars)
    return all(isinstance(value, np.ndarray) for value in operands) and not any(
        depends_on_batch(size) for shape in shapes for size in shape
    )
