"""Convolutions and matrix products of a compiled program: operations, operands and layouts."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxft.hlo_text import Array, Instruction, arrays


class Product(NamedTuple):
    """A convolution or a matrix product.

    Attributes:
      flops: its operations, two for each product of two numbers; none for products with padding.
      operands: types of its factors, such as `bf16 x bf16`.
      is_backward: whether it is part of a gradient.
      layout: axes of input, kernel and output of one of cuDNN's convolutions, from the slowest to
        the fastest, such as `b01f_o01i->b01f`; empty for others, which have any.
    """

    flops: int
    operands: str
    is_backward: bool
    layout: str


def product(instruction: Instruction, types: Mapping[str, str]) -> Product | None:
    """Returns the product that an instruction computes; None if it is another operation.

    Args:
      instruction: an instruction of a program for CPU, GPU or TPU. A GPU calls libraries: cuDNN and
        cuBLAS.
      types: types of all results, by the name of their instruction.
    """
    target = re.search(r'custom_call_target="__(cudnn\$conv|cublas\$)(\w*)', instruction.rest)
    if not (target or instruction.op in ("convolution", "dot")):
        return None
    factors = [(arrays(types.get(name, "")) or [Array("", ())])[0] for name in instruction.operands]
    first, second = factors[:2]
    result, layout = arrays(instruction.type)[0], ""
    if (target and target[1] == "cudnn$conv") or instruction.op == "convolution":
        flops = _conv_flops(
            instruction.rest, *_roles(target[2] if target else "", first, second, result)
        )
        layout = _labels(instruction.rest) if target else ""
    else:
        contracted = _numbers(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', instruction)
        flops = 2 * math.prod(result.shape) * math.prod(first.shape[i] for i in contracted)
    return Product(
        flops,
        f"{first.kind} x {second.kind}",
        "transpose(" in instruction.op_name,
        layout,
    )


def _roles(kind: str, first: Array, second: Array, result: Array) -> tuple[Array, Array, Array]:
    """Returns input, kernel and output of a convolution, which cuDNN's gradients also have."""
    if kind == "BackwardInput":
        return result, second, first
    if kind == "BackwardFilter":
        return first, result, second
    return first, second, result


def _conv_flops(attributes: str, x: Array, kernel: Array, y: Array) -> int:
    """Returns the operations of a convolution."""
    of_x, of_kernel, of_y = re.split(r"_|->", _labels(attributes))
    window = {
        name: values.split("x")
        for name, values in re.findall(
            r"(\w+)=([\d_x\-]+)", _match(r"window={([^}]*)}", attributes)
        )
    }
    taps = 1
    for axis in range(len(of_x) - 2):
        low = int(window["pad"][axis].partition("_")[0]) if "pad" in window else 0
        stride, dilation, kernel_dilation = (
            int(window[name][axis]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        last = (x.shape[of_x.index(str(axis))] - 1) * dilation
        taps *= sum(
            0 <= i * stride + k * kernel_dilation - low <= last
            and (i * stride + k * kernel_dilation - low) % dilation == 0
            for i in range(y.shape[of_y.index(str(axis))])
            for k in range(kernel.shape[of_kernel.index(str(axis))])
        )
    parts = int(_match(r"batch_group_count=(\d+)", attributes) or 1)
    batch = x.shape[of_x.index("b")] // parts
    channels = kernel.shape[of_kernel.index("i")] * kernel.shape[of_kernel.index("o")]
    return 2 * batch * taps * channels


def _labels(attributes: str) -> str:
    return _match(r"dim_labels=([\w>\-?]+)", attributes)


def _numbers(pattern: str, instruction: Instruction) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", _match(pattern, instruction.rest))]


def _match(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
