"""Convolutions in the form, and with the gradients, that run fastest on each platform.

Each function maps `x` `[b h w i]` and a kernel `[size size i o]` of odd size to
`[b h/stride w/stride o]`, sizes rounded up. The padding is half the kernel's size on all sides;
there is no bias. Gradients are written by hand: reverse mode (`jax.grad`) works, forward mode
(`jax.jvp`) does not.
"""

from functools import partial

import jax
import jax.numpy as jnp

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_Pair = tuple[jax.Array, jax.Array]
"""An input and a kernel, or their gradients."""

# XLA on CPU is slow where an output has at most this many channels, or columns; see
# `side_by_side_conv`.
_SLOW_CHANNELS = 64
_SLOW_COLUMNS = 2


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Computes a convolution, grouped if `groups` is above 1."""
    if kernel.shape[0] == 1 and groups == 1:
        return conv_1x1(x, kernel, stride)
    if groups == x.shape[-1] == kernel.shape[-1]:
        return depthwise_conv(x, kernel, stride)
    return dense_conv(x, kernel, stride) if groups == 1 else grouped_conv(x, kernel, stride, groups)


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes a 1x1 convolution with a kernel `[i o]` as a matrix product.

    On CPU its gradients are up to six times as fast as XLA's convolution gradients.
    """
    return x @ kernel


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Pair]:
    return x @ kernel, (x, kernel)


def _pointwise_backward(residuals: _Pair, grad_y: jax.Array) -> _Pair:
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    product = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    # XLA on CPU transposes the first factor and recomputes the operations fused into it, so the
    # narrower array comes first.
    narrow_input = x.shape[-1] <= grad_y.shape[-1]
    grad_kernel = product(x, grad_y) if narrow_input else product(grad_y, x).T
    return grad_y @ kernel.T, grad_kernel


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_1x1(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes a 1x1 convolution of every `stride`-th pixel.

    On CPU and TPU it is a matrix product, except that a TPU would store the slice of `x`: its
    strided convolutions are fused with what computes `x`. On GPU it is one of cuDNN's convolutions:
    XLA (jax 0.10.2) cannot compile some products of slices.
    """
    conv = partial(xla_conv, stride=stride, groups=1)
    product = partial(_sliced_product, stride=stride)
    y: jax.Array = jax.lax.platform_dependent(
        x, kernel, cuda=conv, rocm=conv, tpu=conv if stride > 1 else product, default=product
    )
    return y


def _sliced_product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return pointwise_conv(x[:, ::stride, ::stride], kernel[0, 0])


def _1x1_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
    return conv_1x1(x, kernel, stride), (x, kernel)


def _1x1_backward(stride: int, residuals: _Pair, grad_y: jax.Array) -> _Pair:
    def product_gradients(x: jax.Array, kernel: jax.Array, grad_y: jax.Array) -> _Pair:
        return jax.vjp(partial(_sliced_product, stride=stride), x, kernel)[1](grad_y)

    conv_gradients = partial(_xla_gradients, stride=stride)
    return jax.lax.platform_dependent(
        *residuals,
        grad_y,
        cuda=conv_gradients,
        rocm=conv_gradients,
        default=product_gradients,
    )


conv_1x1.defvjp(_1x1_forward, _1x1_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes an ungrouped convolution on all cores of a CPU, with gradients fast in loops.

    The gradients of `jax.grad` have another order of axes, which XLA on CPU optimises only in the
    outermost computation: in the body of a `jax.lax.scan` the kernel's gradient takes 160 times as
    long (3x3, 128 channels, 28 px).
    """
    slow = kernel.shape[-1] <= _SLOW_CHANNELS or x.shape[2] <= stride * _SLOW_COLUMNS
    cpu_conv = side_by_side_conv if slow else xla_conv
    y: jax.Array = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(cpu_conv, stride=stride, groups=1),
        default=partial(xla_conv, stride=stride, groups=1),
    )
    return y


def _dense_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
    return dense_conv(x, kernel, stride), (x, kernel)


def _dense_backward(stride: int, residuals: _Pair, grad_y: jax.Array) -> _Pair:
    gradients: _Pair = jax.lax.platform_dependent(
        *residuals,
        grad_y,
        cpu=partial(_cpu_gradients, stride=stride),
        default=partial(_xla_gradients, stride=stride),
    )
    return gradients


def _xla_gradients(x: jax.Array, kernel: jax.Array, grad_y: jax.Array, stride: int) -> _Pair:
    """Computes the gradients of an ungrouped `xla_conv` as `jax.grad` does."""
    gradients: _Pair = jax.vjp(partial(xla_conv, stride=stride, groups=1), x, kernel)[1](grad_y)
    return gradients


def _cpu_gradients(x: jax.Array, kernel: jax.Array, grad_y: jax.Array, stride: int) -> _Pair:
    """Computes the gradients of an ungrouped `xla_conv` as convolutions in the usual axis order."""
    size, _, c_in, c_out = kernel.shape
    side = size // 2
    far_side = size - 1 - side
    # The gradients need `grad_y` with `stride - 1` zeros between its pixels. With `missing` more
    # zeros at its end it has the size of `x`, as if the stride were 1.
    dilated_sizes = [stride * (pixels - 1) + 1 for pixels in grad_y.shape[1:3]]
    missing = [full - dilated for full, dilated in zip(x.shape[1:3], dilated_sizes, strict=True)]
    rotated_kernel = kernel[::-1, ::-1].transpose(0, 1, 3, 2)

    def kernel_gradient(x: jax.Array, grad_y: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            grad_y.transpose(1, 2, 0, 3),
            window_strides=(1, 1),
            padding=[(side, far_side - zeros) for zeros in missing],
            rhs_dilation=(stride, stride),
            dimension_numbers=_DIMENSIONS,
        ).transpose(1, 2, 0, 3)

    if grad_y.shape[2] <= _SLOW_COLUMNS or (stride == 1 and c_in <= _SLOW_CHANNELS):
        padding = [(0, 0, 0), *((0, zeros, stride - 1) for zeros in missing), (0, 0, 0)]
        dilated = jax.lax.pad(grad_y, jnp.zeros((), grad_y.dtype), padding)
        grad_x = side_by_side_conv(dilated, rotated_kernel, 1, 1)
    else:
        grad_x = jax.lax.conv_general_dilated(
            grad_y,
            rotated_kernel,
            window_strides=(1, 1),
            padding=[(far_side, side + zeros) for zeros in missing],
            lhs_dilation=(stride, stride),
            dimension_numbers=_DIMENSIONS,
        )
    if c_out > _SLOW_CHANNELS or len(x) % 2:
        return grad_x, kernel_gradient(x, grad_y)
    # Two convolutions, each over every other image, run on two threads.
    x, grad_y = (array.reshape(-1, 2, *array.shape[1:]) for array in (x, grad_y))
    first, second = (kernel_gradient(x[:, i], grad_y[:, i]) for i in (0, 1))
    return grad_x, first + second


dense_conv.defvjp(_dense_forward, _dense_backward)


@partial(jax.jit, static_argnames=("stride", "groups"))
def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Computes a grouped convolution, on CPU by `tap_conv`.

    On CPU the gradient of XLA's grouped convolution takes 60 to 180 times as long.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(tap_conv, stride=stride, groups=groups),
        default=partial(xla_conv, stride=stride, groups=groups),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes a depthwise convolution, which has one group and one output per channel.

    On CPU, XLA's takes 13 to 24 times as long, and its gradients 12 to 25 times.
    """
    y: jax.Array = grouped_conv(x, kernel, stride, x.shape[-1])
    return y


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride: int, residuals: _Pair, grad_y: jax.Array) -> _Pair:
    def xla_gradients(x: jax.Array, kernel: jax.Array, grad_y: jax.Array) -> _Pair:
        conv = partial(xla_conv, stride=stride, groups=x.shape[-1])
        gradients: _Pair = jax.vjp(conv, x, kernel)[1](grad_y)
        return gradients

    gradients: _Pair = jax.lax.platform_dependent(
        *residuals,
        grad_y,
        cpu=partial(_depthwise_cpu_gradients, stride=stride),
        default=xla_gradients,
    )
    return gradients


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


@partial(jax.jit, static_argnames=("stride",))
def _depthwise_cpu_gradients(
    x: jax.Array, kernel: jax.Array, grad_y: jax.Array, stride: int
) -> _Pair:
    """Computes the gradients of a depthwise convolution in vectorised loops."""
    size, (b, h, w, c) = kernel.shape[0], x.shape
    if stride > 1:  # zeros between the pixels, as if the stride were 1
        padding = [
            (0, full - stride * (pixels - 1) - 1, stride - 1)
            for full, pixels in zip((h, w), grad_y.shape[1:3], strict=True)
        ]
        zero = jnp.zeros((), grad_y.dtype)
        grad_y = jax.lax.pad(grad_y, zero, [(0, 0, 0), *padding, (0, 0, 0)])
    grad_x = tap_conv(grad_y, kernel[::-1, ::-1], 1, c)
    side, sum_dtype = size // 2, jnp.promote_types(x.dtype, jnp.float32)
    wide = jnp.pad(x.astype(sum_dtype), ((0, 0), (side, side), (side, side), (0, 0)))

    # XLA's sums over pixels are not vectorised, so each row of an image adds its products to sums
    # [size w c], one for each column of the kernel.
    def add_row(index: int, sums: list[jax.Array]) -> list[jax.Array]:
        start = (index // h, index % h, 0, 0)
        rows = jax.lax.dynamic_slice(wide, start, (1, size, *wide.shape[2:]))[0]
        row = jax.lax.dynamic_slice(grad_y, start, (1, 1, w, c))[0]
        return [total + rows[:, j : j + w] * row for j, total in enumerate(sums)]

    sums = [jnp.zeros((size, w, c), sum_dtype)] * size
    sums = jax.lax.fori_loop(0, b * h, add_row, sums)
    grad_kernel = jnp.stack([total.sum(1) for total in sums], 1)[:, :, None]
    return grad_x, grad_kernel.astype(kernel.dtype)


def xla_conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Computes XLA's convolution."""
    # Not "SAME": with stride 2 it pads (0, 1) where torch pads (1, 1).
    side = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((side, side), (side, side)),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def side_by_side_conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Computes the result of `xla_conv` with the batch's images side by side, as one wide image.

    XLA on CPU distributes an output's columns and channels among threads, but neither rows nor
    images: an output of 64 channels, 56 px wide, runs on one thread. At 2x2 px and 512 channels,
    `xla_conv` takes 40 times as long.
    """
    b, _, w, _ = x.shape
    pitch = -(-(w + kernel.shape[0] // 2) // stride) * stride  # an image and the zeros after it
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pitch - w), (0, 0)))
    x = jax.lax.collapse(x.transpose(1, 0, 2, 3), 1, 3)
    y = xla_conv(x[None], kernel, stride, groups)[0]
    y = y.reshape(len(y), b, pitch // stride, y.shape[-1])
    return y[:, :, : -(-w // stride)].transpose(1, 0, 2, 3)


def tap_conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Computes the result of `xla_conv` as a sum over the kernel's pixels (taps).

    Each tap is one matrix product per group. The sum is in float32 at least, as within XLA's
    convolution.
    """
    size, _, c_in, c_out = kernel.shape
    b, h, w, _ = x.shape
    side, rows, columns = size // 2, -(-h // stride), -(-w // stride)
    x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    x = x.reshape(*x.shape[:3], groups, c_in)
    kernel = kernel.reshape(size, size, c_in, groups, c_out // groups)
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((), sum_dtype)
    for i in range(size):
        for j in range(size):
            tap = x[:, i : i + h : stride, j : j + w : stride]
            y += jnp.einsum("bhwgi,igo->bhwgo", tap, kernel[i, j], preferred_element_type=sum_dtype)
    return y.astype(x.dtype).reshape(b, rows, columns, c_out)
