"""Convolutions, in the forms and with the gradients that are fastest on each platform.

All are `(x, kernel) -> y`: `[b h w i]` and `[size size i o]`, odd sizes, to `[b h/stride w/stride
o]`, sizes rounded up; padded by half the kernel's size, without bias. Gradients are written out:
`jax.grad` works, forward mode (`jax.jvp`) does not.
"""

from functools import partial

import jax
import jax.numpy as jnp

_ORDER = ("NHWC", "HWIO", "NHWC")
_Saved = tuple[jax.Array, jax.Array]
# Of an output of XLA's on CPU, see `in_one_row`.
_ONE_THREAD = 64  # channels
_NARROW = 2  # columns


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """The convolution; of `groups`, each sees its own part of the input's channels."""
    if kernel.shape[0] == 1 and groups == 1:
        return pointwise(x[:, ::stride, ::stride], kernel[0, 0])
    return dense(x, kernel, stride) if groups == 1 else grouped(x, kernel, stride, groups)


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution as a matrix product, whose gradients XLA has up to six times sooner on CPU.

    `kernel` is `[i o]`.
    """
    return x @ kernel


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Saved]:
    return x @ kernel, (x, kernel)


def _pointwise_backward(saved: _Saved, g: jax.Array) -> _Saved:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    product = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    # On CPU the first factor is transposed, and all that it is made of computed again for that:
    # let it be the narrower one.
    of_kernel = product(x, g) if x.shape[-1] <= g.shape[-1] else product(g, x).T
    return g @ kernel.T, of_kernel


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution, on all cores of a CPU, and with gradients that are as fast in loops there.

    What `jax.grad` makes of one has another order of axes, which XLA does away with in the
    outermost computation only: in the body of a `jax.lax.scan` the kernel's gradient takes 160
    times as long (3x3, 128 channels, 28 px).
    """
    slow = kernel.shape[-1] <= _ONE_THREAD or x.shape[2] <= stride * _NARROW
    on_cpu = in_one_row if slow else by_xla
    found: jax.Array = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(on_cpu, stride=stride, groups=1),
        default=partial(by_xla, stride=stride, groups=1),
    )
    return found


def _dense_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Saved]:
    return dense(x, kernel, stride), (x, kernel)


def _dense_backward(stride: int, saved: _Saved, g: jax.Array) -> _Saved:
    def of_xla(x: jax.Array, kernel: jax.Array, g: jax.Array) -> _Saved:
        of_both: _Saved = jax.vjp(partial(by_xla, stride=stride, groups=1), x, kernel)[1](g)
        return of_both

    found: _Saved = jax.lax.platform_dependent(
        *saved, g, cpu=partial(_gradients, stride=stride), default=of_xla
    )
    return found


def _gradients(x: jax.Array, kernel: jax.Array, g: jax.Array, stride: int) -> _Saved:
    """The same as those of `by_xla`, of one group, as convolutions of the usual order of axes."""
    size, _, c_in, c_out = kernel.shape
    side = size // 2
    # Of g with zeros between its pixels, and what stride 1 would have had besides, at the end.
    spread = [stride * (pixels - 1) + 1 for pixels in g.shape[1:3]]
    besides = [pixels - wide for pixels, wide in zip(x.shape[1:3], spread, strict=True)]
    far = size - 1 - side
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)

    def of_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            g.transpose(1, 2, 0, 3),
            window_strides=(1, 1),
            padding=[(side, far - more) for more in besides],
            rhs_dilation=(stride, stride),
            dimension_numbers=_ORDER,
        ).transpose(1, 2, 0, 3)

    if g.shape[2] <= _NARROW or (stride == 1 and c_in <= _ONE_THREAD):
        zeros = [(0, more, stride - 1) for more in besides]
        of_stride_1 = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *zeros, (0, 0, 0)])
        of_x = in_one_row(of_stride_1, turned, 1, 1)
    else:
        of_x = jax.lax.conv_general_dilated(
            g,
            turned,
            window_strides=(1, 1),
            padding=[(far, side + more) for more in besides],
            lhs_dilation=(stride, stride),
            dimension_numbers=_ORDER,
        )
    if c_out > _ONE_THREAD or len(x) % 2:
        return of_x, of_kernel(x, g)
    # Of every other image, twice: two programs, that a thread each can run.
    x, g = (array.reshape(-1, 2, *array.shape[1:]) for array in (x, g))
    return of_x, of_kernel(x[:, 0], g[:, 0]) + of_kernel(x[:, 1], g[:, 1])


dense.defvjp(_dense_forward, _dense_backward)


@partial(jax.jit, static_argnames=("stride", "groups"))
def grouped(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """A grouped convolution; on CPU by taps: XLA's gradient there takes 60 to 180 times as long."""
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(by_taps, stride=stride, groups=groups),
        default=partial(by_xla, stride=stride, groups=groups),
    )


def by_xla(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """XLA's convolution."""
    # Not "SAME": with stride 2 it pads (0, 1) where torch pads (1, 1).
    side = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((side, side), (side, side)),
        dimension_numbers=_ORDER,
        feature_group_count=groups,
    )


def in_one_row(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """The same as `by_xla`, of the batch's images side by side, with zeros between them.

    XLA on CPU shares an output's columns and channels out among threads, and neither rows nor
    images: 64 channels, 56 px wide, are left to one thread. At 2x2 px, with 512 channels, it takes
    40 times as long without.
    """
    b, _, w, _ = x.shape
    pitch = -(-(w + kernel.shape[0] // 2) // stride) * stride
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pitch - w), (0, 0)))
    x = jax.lax.collapse(x.transpose(1, 0, 2, 3), 1, 3)
    y = by_xla(x[None], kernel, stride, groups)[0]
    y = y.reshape(len(y), b, pitch // stride, y.shape[-1])
    return y[:, :, : -(-w // stride)].transpose(1, 0, 2, 3)


def by_taps(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """The same as `by_xla`: a sum over the kernel's pixels of a matrix product a group.

    The sum is in float32 at least, as that within a convolution is.
    """
    size, _, c_in, c_out = kernel.shape
    b, h, w, _ = x.shape
    side, rows, columns = size // 2, -(-h // stride), -(-w // stride)
    x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    x = x.reshape(*x.shape[:3], groups, c_in)
    kernel = kernel.reshape(size, size, c_in, groups, c_out // groups)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((), wide)
    for i in range(size):
        for j in range(size):
            tap = x[:, i : i + h : stride, j : j + w : stride]
            y += jnp.einsum("bhwgi,igo->bhwgo", tap, kernel[i, j], preferred_element_type=wide)
    return y.astype(x.dtype).reshape(b, rows, columns, c_out)
