"""Converts a traced function to an ONNX graph, for the operations of networks in evaluation.

The function is traced for a batch of `BATCH` images, a prime number. A dimension that is a multiple
of it is a multiple of the batch size, so that the graph takes batches of any size. Operations on
constants are computed by jax here; `jaxft.weights.onnx_operations` converts the others.

Transposes are delayed until an operation needs them. ONNX's convolutions have channels first, and
in jax they are last; without the pairs of transposes between them, ONNX Runtime fuses convolutions
with norm and activation layers.
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
"""A constant, or the name of a value in the graph. Either may have size 1 along an axis where jax
has repeated values: ONNX's elementwise operators broadcast."""

# Primitives that only call a function; their parameters hold it as `jaxpr` or `call_jaxpr`.
_CALLS = {"jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}
_FUNCTIONS = ("jaxpr", "call_jaxpr")


class UnsupportedError(Exception):
    """An operation that ONNX or the converter lacks."""


class Graph:
    """Nodes and constants of an ONNX graph.

    Attributes:
      nodes: the nodes, in order.
      constants: the arrays, by name.
      shapes: the shape of each value, by name.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._transposed: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(self, operator: str, *inputs: Value, shape: Sequence[int], **attributes: Any) -> str:
        """Adds a node with one output of this shape; returns the output's name."""
        names = [self.name(value) for value in inputs]
        output = f"{operator}_{len(self.shapes)}"
        self.nodes.append(_node(operator, names, output, **attributes))
        self.shapes[output] = tuple(shape)
        return output

    def name(self, value: Value) -> str:
        """Returns the name of a value; stores a constant under a new name, equal ones once."""
        if isinstance(value, str):
            if value in self._transposed:
                source, permutation = self._transposed.pop(value)
                self.nodes.append(_node("Transpose", [source], value, perm=list(permutation)))
            return value
        value = np.asarray(value)
        check_dtype(value.dtype)
        key = (value.shape, value.dtype, value.tobytes())
        if key not in self._names:
            self._names[key] = name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            self.shapes[name] = value.shape
        return self._names[key]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Returns the shape that a value has in the graph."""
        return self.shapes[value] if isinstance(value, str) else value.shape

    def dimensions(self, shape: Sequence[int]) -> Value:
        """Returns a shape as int64 values, computed from the batch size where it depends on it."""
        if not any(map(depends_on_batch, shape)):
            return np.array(shape, np.int64)
        batch = self.add("Shape", "images", shape=(1,), start=0, end=1)
        parts: list[Value] = []
        for size in shape:
            part: Value = np.array([size], np.int64)
            if depends_on_batch(size):
                factor = np.array([size // BATCH], np.int64)
                part = self.add("Mul", batch, factor, shape=(1,))
            parts.append(part)
        return self.add("Concat", *parts, shape=(len(shape),), axis=0)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Reshapes a value."""
        if self.shape(value) == tuple(shape):
            return value
        if isinstance(value, np.ndarray):
            return value.reshape(shape)
        inferred = [-1 if depends_on_batch(size) else size for size in shape]
        sizes = np.array(inferred, np.int64)
        target = sizes if inferred.count(-1) < 2 else self.dimensions(shape)
        return self.add("Reshape", value, target, shape=shape)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Repeats values along the axes where the graph has size 1 and `shape` has more."""
        shape, actual = tuple(shape), self.shape(value)
        if actual == shape:
            return value
        if isinstance(value, np.ndarray) and not any(map(depends_on_batch, shape)):
            return np.broadcast_to(value, shape)
        target = [1 if old == new else new for old, new in zip(actual, shape, strict=True)]
        return self.add("Expand", value, self.dimensions(target), shape=shape)

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        """Permutes the axes of a value; its node is added when an operation needs the result."""
        if isinstance(value, np.ndarray):
            return value.transpose(permutation)
        source, before = self.stored(value)
        permutation = tuple(before[axis] for axis in permutation)
        if permutation == tuple(range(len(permutation))):
            return source
        output = f"Transpose_{len(self.shapes)}"
        self.shapes[output] = tuple(self.shapes[source][axis] for axis in permutation)
        self._transposed[output] = source, permutation
        return output

    def stored(self, value: str) -> tuple[str, tuple[int, ...]]:
        """Returns the value, and the permutation of its axes, that a delayed transpose stands for.

        Without one these are `value` itself and the identity.
        """
        return self._transposed.get(value, (value, tuple(range(len(self.shapes[value])))))


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(operator, inputs, [output], output, **attributes)


_DTYPES = {
    "float32", "float64", "float16", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip


def check_dtype(dtype: np.dtype) -> None:
    """Raises UnsupportedError for dtypes that ONNX Runtime does not compute in on CPU."""
    if np.dtype(dtype).name not in _DTYPES:
        raise UnsupportedError(f"values of {np.dtype(dtype).name}")


def depends_on_batch(size: int) -> bool:
    """Returns whether a dimension is a multiple of the batch size."""
    return size > 0 and size % BATCH == 0


def convert(
    function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct, name: str
) -> bytes:
    """Converts a function to an ONNX model with the input `images` and the output `logits`.

    Args:
      function: maps images to logits; its first axis is the batch.
      images: shape and dtype of the images, for a batch of `BATCH`.
      name: name of the network.

    Raises:
      ModelError: an operation is not supported; the message names it and the module.
    """
    from onnx import checker, helper, numpy_helper

    closed, graph = jax.make_jaxpr(function)(images), Graph()
    graph.shapes["images"] = images.shape
    (result,) = _inline(graph, closed.jaxpr, closed.consts, ["images"], name)
    (logits,) = closed.out_avals
    graph.add("Identity", graph.expand(result, logits.shape), shape=logits.shape)
    graph.nodes[-1].output[0] = "logits"
    used = {"logits"}
    nodes = [node for node in reversed(graph.nodes) if _marks_inputs(node, used)][::-1]
    constants = [name for name in graph.constants if name in used]

    def described(name: str, dtype: Any, shape: Sequence[int]) -> Any:
        dims = ["batch" if depends_on_batch(size) else size for size in shape]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, dims)

    model = helper.make_model(
        helper.make_graph(
            nodes,
            name,
            [described("images", images.dtype, images.shape)],
            [described("logits", logits.dtype, logits.shape)],
            [numpy_helper.from_array(graph.constants[name], name) for name in constants],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jaxft",
    )
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _marks_inputs(node: Any, used: set[str]) -> bool:
    """Returns whether a node's output is used, and then adds its inputs to those."""
    is_used = node.output[0] in used
    if is_used:
        used.update(node.input)
    return is_used


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
        place = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        try:
            results = _convert(graph, equation, operands, place)
        except UnsupportedError as error:
            raise ModelError(f"{place} cannot be exported to ONNX: it uses {error}.") from error
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _convert(graph: Graph, equation: Any, operands: Sequence[Value], place: str) -> Sequence[Value]:
    from jaxft.weights.onnx_operations import ELEMENTWISE, OPERATIONS

    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        # The form for platforms that none of the branches names, usually XLA's operation.
        if None not in params["platforms"]:
            raise UnsupportedError("platform_dependent without a default")
        return [np.array(params["platforms"].index(None))]
    if name == "cond" and isinstance(operands[0], np.ndarray):
        branches = params["branches"]
        function = branches[int(np.clip(operands[0], 0, len(branches) - 1))]
        return _inline(graph, function.jaxpr, function.consts, operands[1:], place)
    if name in _CALLS:
        function = next(params[key] for key in _FUNCTIONS if key in params)
        jaxpr, consts = getattr(function, "jaxpr", function), getattr(function, "consts", ())
        return _inline(graph, jaxpr, consts, operands, place)
    shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
    if all(isinstance(value, np.ndarray) for value in operands):
        if name in ELEMENTWISE:
            return _compute(equation, np.broadcast_arrays(*operands))
        if not any(map(depends_on_batch, (size for shape in shapes for size in shape))):
            pairs = zip(operands, shapes, strict=False)
            return _compute(equation, [np.broadcast_to(*pair) for pair in pairs])
    if name not in OPERATIONS:
        raise UnsupportedError(f"the operation {name}")
    if name not in ELEMENTWISE and name != "broadcast_in_dim":
        operands = [graph.expand(*pair) for pair in zip(operands, shapes, strict=False)]
    return OPERATIONS[name](graph, equation, *operands)


def _compute(equation: Any, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Computes an operation on constants."""
    results = equation.primitive.bind(*map(jax.numpy.asarray, operands), **equation.params)
    return [*map(np.asarray, results if equation.primitive.multiple_results else [results])]
