"""Costs read from compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.hlo_cost import hlo_cost

# As XLA prints a program for TPUs, shortened.
TPU_PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %k = bf16[4,4]{1,0} parameter(1)
  ROOT %d = bf16[8,4]{1,0} dot(%p, %k), lhs_contracting_dims={1}, \
metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
}

%again (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %all-reduce.9 = f32[8]{0} all-reduce(%x), backend_config={"estimated_cycles":"500"}
}

%once (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

%all-reduce-scatter.1 (z: f32[24]) -> f32[8] {
  %z = f32[24]{0} parameter(0)
  %all-reduce.7 = f32[24]{0} all-reduce(%z), channel_id=7, to_apply=%once
  ROOT %slice = f32[8]{0} slice(%all-reduce.7)
}

%body (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  %begin = f32[8]{0} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %m = f32[8]{0} fusion(%s), calls=%fused, backend_config={"estimated_cycles":"10"}
}

%until (u: s32[]) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %u = s32[] parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%u, %five), direction=LT
}

%counted (s: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} fusion(%s), backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: bf16[8,4], /*index=1*/b: f32[8]) -> (bf16[8,4], f32[8]) {
  %a = bf16[8,4]{1,0} parameter(0)
  %f = (bf16[8,4]{1,0}, /*index=1*/f32[8]{0}) fusion(%a), backend_config={"estimated_cycles":"1000"}
  %r = (f32[64]{0:T(128)S(1)}, f32[]) all-reduce(%f, %f), replica_groups={}, to_apply=%once
  %g = (f32[2]{0}, f32[16]{0}) all-gather-start(%f), dimensions={0}
  %h = f32[16]{0} all-gather-done(%g)
  %v = f32[8]{0} while(%h), condition=%until, body=%counted
  %w = f32[8]{0} while(%v), body=%body, config={"known_trip_count":{"n":"3"}}
  %u = (f32[1,1,128]{2,1,0:T(1,128)}, u32[], token[]) send(%w), attributes={name="xla_megascale"}
  %i = (f32[8]{0}, u32[], token[]) send(%w), is_host_transfer=true
  %c = f32[8]{0} conditional(%a, %w, %w), true_computation=%again, false_computation=%once
  ROOT %t = (bf16[8,4]{1,0}, f32[8]{0}) tuple(%a, %c)
}
"""


class Compiled:
    """A compiled program with this text."""

    class Memory:
        argument_size_in_bytes, output_size_in_bytes = 100, 50
        alias_size_in_bytes, temp_size_in_bytes = 40, 7

    def cost_analysis(self):
        return {"flops": 12.0, "bytes accessed": 34.0}

    def memory_analysis(self):
        return self.Memory

    def as_text(self):
        return TPU_PROGRAM


def test_hlo_cost_of_tpu_program():
    cost = hlo_cost(Compiled())
    # Two more iterations of one loop, with a product of [8 4] and [4 4], and four of another.
    assert cost.flops == 12 + 2 * (2 * 8 * 4 * 4)
    assert cost.bytes_accessed == 34 + 2 * (2 * 64) + 4 * 64
    assert (cost.memory, cost.temporary) == (100 + 50 - 40 + 7, 7)
    assert cost.cycles == 1000 + 3 * 10 + 5 * 100  # the conditional's cheaper branch has none
    assert cost.collectives == {
        "all-reduce": 1,
        "all-gather": 1,
        "reduce-scatter": 3,
        "cross-slice": 1,
    }
    assert cost.collective_bytes == {
        "all-reduce": 65 * 4,
        "all-gather": 16 * 4,
        "reduce-scatter": 3 * 24 * 4,  # in a loop of three
        "cross-slice": 128 * 4,
    }
    assert cost.convolutions == {"backward": 1}
    assert cost.operands == {"bf16 x bf16": 1}
    assert cost.aliases == 2


def test_hlo_cost_of_compiled_program():
    def step(x, kernel):
        return x + 1, jax.grad(lambda k: jnp.sum((x @ k) ** 2))(kernel)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 16))]
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    cost = hlo_cost(compiled)
    assert cost.flops == pytest.approx(2 * 2 * 64 * 32 * 16, rel=0.1)
    assert cost.memory >= 4 * (64 * 32 + 2 * 32 * 16)
    assert cost.aliases == 1
    assert cost.cycles == 0
    assert cost.collectives == {}
