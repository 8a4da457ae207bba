"""ONNX operators of jax's operations, as tables that `jaxft.weights.onnx_graph` reads."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.weights.onnx_graph import Graph, UnsupportedError, Value, depends_on_batch

Converter = Callable[..., Value | Sequence[Value]]
"""Receives the graph, jax's equation and the operands; returns the result, or several."""

_SAME = {
    "abs": "Abs", "acos": "Acos", "add": "Add", "add_any": "Add", "and": "And", "asin": "Asin",
    "atan": "Atan", "ceil": "Ceil", "copy": "Identity", "cos": "Cos", "div": "Div", "eq": "Equal",
    "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater",
    "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less", "min": "Min",
    "mul": "Mul", "name": "Identity", "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow",
    "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "stop_gradient": "Identity", "tan": "Tan",
    "tanh": "Tanh", "xor": "Xor",
}  # fmt: skip
"""Operators with the same operands."""

COMPOSED: dict[str, Callable[..., jax.Array]] = {
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(low, x), high),
    "erfc": lambda x: 1 - jax.lax.erf(x),
    "exp2": lambda x: jnp.exp(x * math.log(2)),
    "expm1": lambda x: jnp.exp(x) - 1,
    "log1p": lambda x: jnp.log(x + 1),
    "ne": lambda x, y: ~(x == y),
    "rsqrt": lambda x: 1 / jnp.sqrt(x),
    "square": lambda x: x * x,
}
"""Operations that ONNX lacks, in terms of others."""


# ONNX Runtime fuses convolutions with Add and Relu, but not with Sub and Max.
def _sub(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
    if isinstance(y, np.ndarray) and y.dtype.kind == "f":
        return graph.add("Add", x, -y)
    return graph.add("Sub", x, y)


def _max(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
    if isinstance(y, np.ndarray) and y.dtype.kind == "f" and not y.any():
        return graph.add("Relu", x)
    return graph.add("Max", x, y)


def _integer_pow(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.add("Pow", x, np.array(equation.params["y"], equation.invars[0].aval.dtype))


def _select(graph: Graph, equation: Any, which: Value, *cases: Value) -> Value:
    if equation.invars[0].aval.dtype != bool:
        raise UnsupportedError("select_n with an integer")
    return graph.add("Where", which, *reversed(cases))


def _cast(graph: Graph, equation: Any, x: Value) -> Value:
    from onnx import helper

    dtype = np.dtype(equation.outvars[0].aval.dtype)
    return graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(dtype))


def _broadcast(graph: Graph, equation: Any, x: Value) -> Value:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    new = np.array([axis for axis in range(len(shape)) if axis not in axes], np.int64)
    if len(new):
        x = graph.add("Unsqueeze", x, new)
    is_wider = math.prod(shape) != math.prod(equation.invars[0].aval.shape)
    return graph.add("Expand", x, graph.shape(shape)) if is_wider else x


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    shape = equation.outvars[0].aval.shape
    if sum(map(depends_on_batch, shape)) == 1:
        shape = [-1 if depends_on_batch(size) else size for size in shape]
    return graph.add("Reshape", x, graph.shape(shape))


def _transpose(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.transpose(x, equation.params["permutation"])


def _tile(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.add("Tile", x, np.array(equation.params["reps"], np.int64))


def _reduce(operator: str, graph: Graph, equation: Any, x: Value) -> Value:
    return graph.add(operator, x, np.array(equation.params["axes"], np.int64), keepdims=0)


def _arg(operator: str, graph: Graph, equation: Any, x: Value) -> Value:
    (axis,) = equation.params["axes"]
    return _cast(graph, equation, graph.add(operator, x, axis=axis, keepdims=0))


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [1] * len(starts)
    parts = zip(starts, limits, strides, equation.invars[0].aval.shape, strict=True)
    axes = [axis for axis, part in enumerate(parts) if part != (0, part[3], 1, part[3])]
    arguments = (np.array([numbers[a] for a in axes]) for numbers in (starts, limits, strides))
    start, end, step = arguments
    return graph.add("Slice", x, start, end, np.array(axes), step)


def _split(graph: Graph, equation: Any, x: Value) -> Sequence[Value]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    return graph.add_split("Split", x, graph.shape(sizes), count=len(sizes), axis=axis)


def _reverse(graph: Graph, equation: Any, x: Value) -> Value:
    axes = np.array(equation.params["dimensions"], np.int64)
    last, step = np.full_like(axes, np.iinfo(np.int64).min), np.full_like(axes, -1)
    return graph.add("Slice", x, step, last, axes, step)


def _gather(graph: Graph, equation: Any, x: Value, indices: Value) -> Value:
    numbers, aval = equation.params["dimension_numbers"], equation.invars[0].aval
    axes = numbers.collapsed_slice_dims
    others = tuple(axis for axis in range(aval.ndim) if axis not in axes)
    kept = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if len(axes) != 1 or kept != (others, others):
        raise UnsupportedError("gather other than take_along_axis")
    elements = graph.add("Squeeze", indices, np.array([aval.ndim]))
    return graph.add("GatherElements", x, elements, axis=axes[0])


def _concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
    axis = equation.params["dimension"]
    # `jnp.pad` concatenates values of size 0, to which ONNX Runtime cannot broadcast.
    pairs = zip(values, equation.invars, strict=True)
    parts = [value for value, variable in pairs if variable.aval.shape[axis]]
    return graph.add("Concat", *parts, axis=axis)


def _pad(graph: Graph, equation: Any, x: Value, value: Value) -> Value:
    low, high, interior = zip(*equation.params["padding_config"], strict=True)
    if any(interior):
        raise UnsupportedError("pad between values")
    return graph.add("Pad", x, np.array([*low, *high], np.int64), value)


def _dot(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
    (x_summed, y_summed), (x_batch, y_batch) = equation.params["dimension_numbers"]
    x_rank, y_rank = (variable.aval.ndim for variable in equation.invars)
    if (x_summed, y_summed, y_rank) == ((x_rank - 1,), (0,), 2):
        return graph.add("MatMul", x, y)
    letters = iter(ascii_lowercase)
    x_axes = [next(letters) for _ in range(x_rank)]
    y_axes = [next(letters) for _ in range(y_rank)]
    for i, j in zip((*x_batch, *x_summed), (*y_batch, *y_summed), strict=True):
        y_axes[j] = x_axes[i]
    batch = [x_axes[axis] for axis in x_batch]
    free = [axis for axis in x_axes + y_axes if (axis in x_axes) != (axis in y_axes)]
    subscripts = "{},{}->{}".format(*map("".join, (x_axes, y_axes, batch + free)))
    return graph.add("Einsum", x, y, equation=subscripts)


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    params = equation.params
    if any(size != 1 for size in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise UnsupportedError("a transposed convolution or batch groups")
    x_axes, kernel_axes, y_axes = params["dimension_numbers"]
    y = graph.add(
        "Conv",
        graph.transpose(x, x_axes),
        graph.transpose(kernel, kernel_axes),
        strides=params["window_strides"],
        pads=[*(low for low, _ in params["padding"]), *(high for _, high in params["padding"])],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return graph.transpose(y, np.argsort(y_axes).tolist())


def _pool(operator: str, graph: Graph, equation: Any, x: Value) -> Value:
    window, strides, padding, dilations = (
        equation.params[name]
        for name in ("window_dimensions", "window_strides", "padding", "window_dilation")
    )
    parts = [*zip(window, strides, padding, strict=True)]
    outer = [axis for axis, part in enumerate(parts) if part == (1, 1, (0, 0))]
    is_dilated = any(size != 1 for size in equation.params["base_dilation"])
    is_average = operator == "AveragePool"
    if len(outer) < 2 or is_dilated or (is_average and any(size != 1 for size in dilations)):
        raise UnsupportedError(f"{equation.primitive.name} of this form")
    outer = [outer[0], outer[-1]]  # usually batch and channels, which ONNX has first
    inner = [axis for axis in range(len(window)) if axis not in outer]
    y = graph.add(
        operator,
        graph.transpose(x, outer + inner),
        kernel_shape=[window[axis] for axis in inner],
        strides=[strides[axis] for axis in inner],
        pads=[padding[axis][side] for side in (0, 1) for axis in inner],
        **{"count_include_pad": 1} if is_average else {"dilations": [dilations[a] for a in inner]},
    )
    if is_average:
        size = np.array(math.prod(window), equation.invars[0].aval.dtype)
        y = graph.add("Mul", y, size)
    return graph.transpose(y, np.argsort(outer + inner).tolist())


def _same(operator: str, graph: Graph, equation: Any, *operands: Value, **attributes: int) -> Value:
    return graph.add(operator, *operands, **attributes)


CONVERTERS: dict[str, Converter] = {
    **{name: partial(_same, operator) for name, operator in _SAME.items()},
    "argmax": partial(_arg, "ArgMax"),
    "argmin": partial(_arg, "ArgMin"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dot_general": _dot,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "max": _max,
    "optimization_barrier": lambda graph, equation, *values: values,
    "pad": _pad,
    "reduce_max": partial(_reduce, "ReduceMax"),
    "reduce_min": partial(_reduce, "ReduceMin"),
    "reduce_prod": partial(_reduce, "ReduceProd"),
    "reduce_sum": partial(_reduce, "ReduceSum"),
    "reduce_window_max": partial(_pool, "MaxPool"),
    "reduce_window_sum": partial(_pool, "AveragePool"),
    "rem": partial(_same, "Mod", fmod=1),
    "reshape": _reshape,
    "rev": _reverse,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "sub": _sub,
    "tile": _tile,
    "transpose": _transpose,
}
"""All other operations, by the name of jax's primitive."""
