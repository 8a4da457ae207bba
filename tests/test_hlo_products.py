"""Operations of convolutions and matrix products, read from the text of programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxft.hlo_products import product
from jaxft.hlo_text import parse


def products(text):
    computations, _ = parse(text)
    every = [x for instructions in computations.values() for x in instructions]
    types = {instruction.name: instruction.type for instruction in every}
    return [found for x in every if (found := product(x, types))]


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 8, 16), {"window_strides": (1, 1), "padding": "SAME"}),
        ((7, 5, 8, 4), {"window_strides": (2, 3), "padding": ((3, 1), (0, 2))}),
        ((3, 3, 2, 16), {"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 4}),
        ((3, 3, 8, 4), {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)}),
        ((1, 1, 8, 4), {"window_strides": (2, 2), "padding": "VALID"}),
    ],
    ids=["same", "strided", "grouped", "dilated", "1x1"],
)
def test_product_counts_convolutions_and_gradients_as_xla_does(kernel, options):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 9, 10, 8), kernel)]

    def gradients(x, kernel):
        y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, **options), x, kernel)
        return y, vjp(jnp.zeros_like(y))

    lowered = jax.jit(gradients).lower(*shapes)
    found = products(lowered.compiler_ir("hlo").as_hlo_text())
    assert len(found) == 3
    assert sum(each.flops for each in found) == lowered.cost_analysis()["flops"] > 0


def test_product_counts_matrix_products_as_xla_does():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 8, 16), (3, 16, 5))]
    lowered = jax.jit(lambda x, y: jnp.einsum("bik,bko->bio", x, y)).lower(*shapes)
    (found,) = products(lowered.compiler_ir("hlo").as_hlo_text())
    assert found == (lowered.cost_analysis()["flops"], "bf16 x bf16", False, "")


# As XLA prints calls of cuDNN and cuBLAS, shortened.
GPU_PROGRAM = """\
ENTRY %main (x: bf16[8,32,32,16], k: bf16[32,3,3,16], g: bf16[8,16,16,32]) -> f32[8,64] {
  %x = bf16[8,32,32,16]{3,2,1,0} parameter(0)
  %k = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %g = bf16[8,16,16,32]{3,2,1,0} parameter(2)
  %y = (bf16[8,16,16,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), WINDOW, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/jvp()/conv"}
  %dx = (bf16[8,32,32,16]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), WINDOW, \
custom_call_target="__cudnn$convBackwardInput", metadata={op_name="jit(f)/transpose(jvp())/conv"}
  %dk = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), WINDOW, \
custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="jit(f)/transpose(jvp())/conv"}
  %other = f32[8]{0} custom-call(%x), custom_call_target="__cudnn$norm"
  %a = f32[8,128]{1,0} fusion(%y), kind=kLoop, calls=%fused
  %w = f32[64,128]{1,0} constant({...})
  ROOT %gemm = (f32[8,64]{1,0}, s8[4096]{0}) custom-call(%a, %w), \
custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}
}
""".replace("WINDOW", "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f")


def test_products_of_gpu_program():
    taps = (2 * 16 + 15) ** 2  # the last window has two rows and columns of the image
    flops = 2 * 8 * taps * 16 * 32
    layout = "b01f_o01i->b01f"
    assert products(GPU_PROGRAM) == [
        (flops, "bf16 x bf16", False, layout),
        (flops, "bf16 x bf16", True, layout),
        (flops, "bf16 x bf16", True, layout),
        (2 * 8 * 128 * 64, "f32 x f32", False, ""),
    ]
