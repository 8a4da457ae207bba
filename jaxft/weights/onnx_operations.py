"""ONNX operators of jax's operations; `jaxft.weights.onnx_graph` calls the tables below.

Each function receives the graph, jax's equation and the operands, and returns the results. jax
repeats values explicitly before elementwise operations; ONNX's elementwise operators do so
themselves, so `broadcast_in_dim` only adds axes of size 1.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_lowercase
from typing import Any

import numpy as np

from jaxft.weights.onnx_graph import Graph, UnsupportedError, Value, check_dtype, depends_on_batch

Operation = Callable[..., Sequence[Value]]

_UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "log": "Log", "logistic": "Sigmoid", "neg": "Neg", "not": "Not", "sign": "Sign", "sin": "Sin",
    "sqrt": "Sqrt", "tanh": "Tanh", "copy": "Identity", "copy_p": "Identity", "name": "Identity",
}  # fmt: skip
_BINARY = {
    "add": "Add", "add_any": "Add", "mul": "Mul", "div": "Div", "min": "Min",
    "pow": "Pow", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor",
}  # fmt: skip
_REDUCTIONS = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}  # fmt: skip


def _elementwise(graph: Graph, operator: str, *values: Value, **attributes: Any) -> Value:
    """Adds an elementwise operator, on the values before a delayed transpose of an operand."""
    rank = max(len(graph.shape(value)) for value in values)
    names = [
        value for value in values if isinstance(value, str) and len(graph.shape(value)) == rank
    ]
    order = max((graph.stored(name)[1] for name in names), default=tuple(range(rank)))
    inverse = np.argsort(order).tolist()
    values = tuple(graph.transpose(x, inverse) if graph.shape(x) else x for x in values)
    shape = np.broadcast_shapes(*map(graph.shape, values))
    return graph.transpose(graph.add(operator, *values, shape=shape, **attributes), order)


def _simple(operator: str, graph: Graph, equation: Any, *values: Value) -> list[Value]:
    if operator in ("Not", "And", "Or", "Xor") and equation.invars[0].aval.dtype != bool:
        raise UnsupportedError(f"{equation.primitive.name} of integers")
    return [_elementwise(graph, operator, *values)]


def _like(equation: Any, number: float) -> np.ndarray:
    """Returns a scalar of the dtype of the operand."""
    return np.asarray(number, equation.invars[0].aval.dtype)


def _max(graph: Graph, equation: Any, x: Value, y: Value) -> list[Value]:
    for value, other in ((x, y), (y, x)):
        if isinstance(value, str) and _is_zero(other) and np.asarray(other).dtype.kind == "f":
            return [_elementwise(graph, "Relu", value)]
    return [_elementwise(graph, "Max", x, y)]


def _is_zero(value: Value) -> bool:
    return isinstance(value, np.ndarray | np.generic) and not np.any(value)


def _not_equal(graph: Graph, equation: Any, x: Value, y: Value) -> list[Value]:
    return [_elementwise(graph, "Not", _elementwise(graph, "Equal", x, y))]


def _sub(graph: Graph, equation: Any, x: Value, y: Value) -> list[Value]:
    if isinstance(y, str) or equation.invars[0].aval.dtype.kind == "u":
        return [_elementwise(graph, "Sub", x, y)]
    return [_elementwise(graph, "Add", x, np.negative(y))]  # fused with a convolution


def _rsqrt(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [_elementwise(graph, "Reciprocal", _elementwise(graph, "Sqrt", x))]


def _square(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [_elementwise(graph, "Mul", x, x)]


def _erfc(graph: Graph, equation: Any, x: Value) -> list[Value]:
    erf = _elementwise(graph, "Erf", x)
    return [_elementwise(graph, "Sub", _like(equation, 1), erf)]


def _expm1(graph: Graph, equation: Any, x: Value) -> list[Value]:
    power = _elementwise(graph, "Exp", x)
    return [_elementwise(graph, "Sub", power, _like(equation, 1))]


def _log1p(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [_elementwise(graph, "Log", _elementwise(graph, "Add", x, _like(equation, 1)))]


def _integer_pow(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [_elementwise(graph, "Pow", x, _like(equation, equation.params["y"]))]


def _clamp(graph: Graph, equation: Any, low: Value, x: Value, high: Value) -> list[Value]:
    return [_elementwise(graph, "Min", _elementwise(graph, "Max", low, x), high)]


def _select(graph: Graph, equation: Any, which: Value, *cases: Value) -> list[Value]:
    if len(cases) != 2 or equation.invars[0].aval.dtype != bool:
        raise UnsupportedError("select_n of more than two cases")
    otherwise, then = cases
    if _is_relu(graph, which, then, otherwise):
        return [_elementwise(graph, "Relu", otherwise)]
    return [_elementwise(graph, "Where", which, then, otherwise)]


def _is_relu(graph: Graph, which: Value, then: Value, otherwise: Value) -> bool:
    """Returns whether it is `where(x <= 0, 0, x)`; ONNX Runtime fuses a Relu with a convolution."""
    if isinstance(which, np.ndarray) or isinstance(otherwise, np.ndarray) or not _is_zero(then):
        return False
    comparison, x = graph.stored(which)[0], graph.stored(otherwise)[0]
    node = next((node for node in graph.nodes if node.output[0] == comparison), None)
    if node is None or node.op_type != "LessOrEqual" or node.input[0] != x:
        return False
    return _is_zero(graph.constants.get(node.input[1], ""))


def _cast(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [_to_dtype(graph, x, equation.outvars[0].aval.dtype)]


def _to_dtype(graph: Graph, x: Value, dtype: Any) -> Value:
    from onnx import helper

    check_dtype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return _elementwise(graph, "Cast", x, to=kind)


def _broadcast(graph: Graph, equation: Any, x: Value) -> list[Value]:
    rank, axes = len(equation.params["shape"]), equation.params["broadcast_dimensions"]
    shape = [1] * rank
    for axis, size in zip(axes, graph.shape(x), strict=True):
        shape[axis] = size
    return [graph.reshape(x, shape)]


def _reshape(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [graph.reshape(x, equation.outvars[0].aval.shape)]


def _transpose(graph: Graph, equation: Any, x: Value) -> list[Value]:
    return [graph.transpose(x, equation.params["permutation"])]


def _reduce(operator: str, graph: Graph, equation: Any, x: Value) -> list[Value]:
    source, order = _stored(graph, x)
    axes = [order[axis] for axis in equation.params["axes"]]
    kept = [axis for axis in order if axis not in axes]
    shape = [graph.shape(source)[axis] for axis in sorted(kept)]
    y = graph.add(operator, source, np.array(axes, np.int64), shape=shape, keepdims=0)
    return [graph.transpose(y, [sorted(kept).index(axis) for axis in kept])]


def _stored(graph: Graph, x: Value) -> tuple[str, tuple[int, ...]]:
    return graph.stored(x if isinstance(x, str) else graph.name(x))


def _arg(operator: str, graph: Graph, equation: Any, x: Value) -> list[Value]:
    (axis,) = equation.params["axes"]
    result = equation.outvars[0].aval
    index = graph.add(operator, x, shape=result.shape, axis=axis, keepdims=0)
    return [_to_dtype(graph, index, result.dtype)]


def _slice(graph: Graph, equation: Any, x: Value) -> list[Value]:
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    return [_cut(graph, x, starts, limits, params["strides"] or [1] * len(starts))]


def _cut(
    graph: Graph, x: Value, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> Value:
    source, order = _stored(graph, x)
    inverse, sizes = np.argsort(order).tolist(), graph.shape(source)
    starts, limits, strides = ([each[i] for i in inverse] for each in (starts, limits, strides))
    parts = [*zip(starts, limits, strides, sizes, strict=True)]
    axes = [axis for axis, part in enumerate(parts) if part != (0, part[3], 1, part[3])]
    if any(depends_on_batch(sizes[axis]) for axis in axes):
        raise UnsupportedError("a slice of the batch")
    if not axes:
        return x
    shape = [len(range(start, limit, step)) for start, limit, step, _ in parts]
    chosen = ([part[i] for axis, part in enumerate(parts) if axis in axes] for i in range(3))
    first, last, steps = (np.array(numbers, np.int64) for numbers in chosen)
    y = graph.add("Slice", source, first, last, np.array(axes, np.int64), steps, shape=shape)
    return graph.transpose(y, order)


def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis, shape, ends = equation.params["axis"], graph.shape(x), np.cumsum(equation.params["sizes"])
    results = []
    for size, end in zip(equation.params["sizes"], ends.tolist(), strict=True):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = end - size, end
        results.append(_cut(graph, x, starts, limits, [1] * len(shape)))
    return results


def _reverse(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axes = np.array(equation.params["dimensions"], np.int64)
    if any(depends_on_batch(graph.shape(x)[axis]) for axis in axes):
        raise UnsupportedError("rev of the batch")
    ones = np.ones(len(axes), np.int64)
    lowest = np.full(len(axes), np.iinfo(np.int64).min)
    return [graph.add("Slice", x, -ones, lowest, axes, -ones, shape=graph.shape(x))]


def _concatenate(graph: Graph, equation: Any, *values: Value) -> list[Value]:
    axis, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    if depends_on_batch(shape[axis]):
        raise UnsupportedError("concatenate of batches")
    return [graph.add("Concat", *values, shape=shape, axis=axis)]


def _pad(graph: Graph, equation: Any, x: Value, value: Value) -> list[Value]:
    source, order = _stored(graph, x)
    inverse, shape = np.argsort(order).tolist(), equation.outvars[0].aval.shape
    config = [equation.params["padding_config"][axis] for axis in inverse]
    low, high, interior = zip(*config, strict=True)
    if any(interior):
        raise UnsupportedError("pad between values")
    widths = np.array([*low, *high], np.int64)
    y = graph.add("Pad", source, widths, value, shape=[shape[axis] for axis in inverse])
    return [graph.transpose(y, order)]


def _dot(graph: Graph, equation: Any, x: Value, y: Value) -> list[Value]:
    (x_summed, y_summed), (x_batch, y_batch) = equation.params["dimension_numbers"]
    result = equation.outvars[0].aval
    x_rank, y_rank = len(graph.shape(x)), len(graph.shape(y))
    product: Value
    is_product = (x_summed, y_summed, y_rank) == ((x_rank - 1,), (0,), 2)
    if is_product and x_rank == 4:  # a 1x1 convolution
        kernel = graph.reshape(graph.transpose(y, (1, 0)), (*graph.shape(y)[::-1], 1, 1))
        b, h, w, c = result.shape
        product = graph.add("Conv", graph.transpose(x, (0, 3, 1, 2)), kernel, shape=(b, c, h, w))
        product = graph.transpose(product, (0, 2, 3, 1))
    elif is_product:
        product = graph.add("MatMul", x, y, shape=result.shape)
    else:
        letters = iter(ascii_lowercase)
        x_axes = [next(letters) for _ in range(x_rank)]
        y_axes = [next(letters) for _ in range(y_rank)]
        for i, j in zip((*x_batch, *x_summed), (*y_batch, *y_summed), strict=True):
            y_axes[j] = x_axes[i]
        batch = [x_axes[axis] for axis in x_batch]
        x_free = [axis for i, axis in enumerate(x_axes) if i not in (*x_batch, *x_summed)]
        y_free = [axis for j, axis in enumerate(y_axes) if j not in (*y_batch, *y_summed)]
        subscripts = "{},{}->{}".format(*map("".join, (x_axes, y_axes, batch + x_free + y_free)))
        product = graph.add("Einsum", x, y, shape=result.shape, equation=subscripts)
    same = equation.invars[0].aval.dtype == result.dtype
    return [product if same else _to_dtype(graph, product, result.dtype)]


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> list[Value]:
    params, result = equation.params, equation.outvars[0].aval
    if any(size != 1 for size in params["lhs_dilation"]):
        raise UnsupportedError("transposed convolutions (lhs_dilation)")
    if params["batch_group_count"] != 1 or result.dtype != equation.invars[0].aval.dtype:
        raise UnsupportedError("conv_general_dilated with batch groups or another result dtype")
    numbers = params["dimension_numbers"]
    low, high = zip(*params["padding"], strict=True)
    shape = [result.shape[axis] for axis in numbers.out_spec]
    y = graph.add(
        "Conv",
        graph.transpose(x, numbers.lhs_spec),
        graph.transpose(kernel, numbers.rhs_spec),
        shape=shape,
        strides=list(params["window_strides"]),
        pads=[*low, *high],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return [graph.transpose(y, np.argsort(numbers.out_spec).tolist())]


def _pool(operator: str, graph: Graph, equation: Any, x: Value) -> list[Value]:
    params, result = equation.params, equation.outvars[0].aval
    window, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    dilations = params["window_dilation"]
    inside = [
        axis for axis, parts in enumerate(zip(window, strides, padding, strict=True))
        if parts != (1, 1, (0, 0))
    ]  # fmt: skip
    outside = [axis for axis in range(len(window)) if axis not in inside]
    if len(outside) != 2 or any(size != 1 for size in params["base_dilation"]):
        raise UnsupportedError(f"{equation.primitive.name} of this form")
    low, high = zip(*(padding[axis] for axis in inside), strict=True)
    order = outside + inside
    attributes: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in inside],
        "strides": [strides[axis] for axis in inside],
        "pads": [*low, *high],
    }
    if operator == "AveragePool":
        attributes["count_include_pad"] = 1
        if any(dilations[axis] != 1 for axis in inside):
            raise UnsupportedError("reduce_window_sum with dilation")
    else:
        attributes["dilations"] = [dilations[axis] for axis in inside]
    shape = [result.shape[axis] for axis in order]
    y = graph.add(operator, graph.transpose(x, order), shape=shape, **attributes)
    if operator == "AveragePool":
        y = graph.add("Mul", y, _like(equation, math.prod(window)), shape=shape)
    return [graph.transpose(y, np.argsort(order).tolist())]


def _several(graph: Graph, equation: Any, *values: Value) -> Sequence[Value]:
    return values


ELEMENTWISE: dict[str, Operation] = {
    **{name: partial(_simple, operator) for name, operator in (_UNARY | _BINARY).items()},
    "max": _max, "ne": _not_equal, "sub": _sub, "rsqrt": _rsqrt, "square": _square, "erfc": _erfc,
    "expm1": _expm1, "log1p": _log1p, "integer_pow": _integer_pow, "clamp": _clamp,
    "select_n": _select, "convert_element_type": _cast,
}  # fmt: skip
"""Operations whose operands may have size 1 along an axis."""

OPERATIONS: dict[str, Operation] = {
    **ELEMENTWISE,
    **{name: partial(_reduce, operator) for name, operator in _REDUCTIONS.items()},
    "argmax": partial(_arg, "ArgMax"), "argmin": partial(_arg, "ArgMin"),
    "broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _reshape,
    "transpose": _transpose, "slice": _slice, "split": _split, "rev": _reverse,
    "concatenate": _concatenate, "pad": _pad, "dot_general": _dot,
    "conv_general_dilated": _convolution, "reduce_window_max": partial(_pool, "MaxPool"),
    "reduce_window_sum": partial(_pool, "AveragePool"), "optimization_barrier": _several,
}  # fmt: skip
"""All operations, by the name of jax's primitive."""
