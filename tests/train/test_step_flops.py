"""FLOPs of a step are the least that its stage needs, counted product by product."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxft import SGD, Recipe, Stage, data
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.devices import Devices
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.stage_program import build_programs

SIDE, BATCH = 224, 16
RECIPE = Recipe(
    model="resnet18",
    data="given:",
    optimizer=SGD(momentum=0.9),
    batch_size=BATCH,
    image_size=SIDE,
    resize_size=SIDE,
    cache_mib=0,
    stages=(
        Stage("head", {"fc": 1e-3}, epochs=1),
        Stage("late", {"fc": 1e-3, "layer4": 1e-4}, epochs=1),
        Stage("all", {"*": 1e-4}, epochs=1),
    ),
)


def products(jaxpr):
    """Yields the FLOPs of each convolution and matrix product, without padding."""
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            over = math.prod(shapes[0][axis] for axis in contracted)
            yield 2 * over * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":
            (b, *sides, _), (*kernel, c_in, c_out) = shapes
            strides, padding = equation.params["window_strides"], equation.params["padding"]
            taps = 1
            for side, size, stride, (before, after) in zip(
                sides, kernel, strides, padding, strict=True
            ):
                starts = range(-before, side + after - size + 1, stride)
                taps *= sum(0 <= i + j < side for i, j in itertools.product(starts, range(size)))
            yield 2 * b * taps * c_in * c_out
        elif equation.primitive.name == "cond":  # by platform: what is no platform's own form
            yield from products(equation.params["branches"][-1].jaxpr)
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner)


@pytest.fixture(scope="module")
def stages():
    """The programs of the stages, their start, and the products of each block."""
    images = data.arrays(np.zeros((32, SIDE, SIDE, 3), np.uint8), np.arange(32) % 2, "ab")
    recipe = RECIPE.expecting(data.Preprocessing())
    model = recipe.network(2)
    trees = jax.eval_shape(model.init, jax.random.key(0))
    programs = build_programs(recipe, model, Splits(images, images), Devices(), trees)
    x, found = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.float32), {}
    for block in model.blocks:
        forward = partial(model.apply, norms="running", first=block, last=block)
        found[block] = list(products(jax.make_jaxpr(forward)(*trees, x).jaxpr))
        x = jax.eval_shape(forward, *trees, x)[0]
    return programs, trees, found


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_step_flops_are_the_least(stages, index):
    """Forward of all blocks, backward of trained ones; norms, ReLU and optimizer are within 2 %."""
    programs, (params, stats), found = stages
    trained = [("head",), ("layer4", "head"), tuple(found)][index]
    backward = 2 * sum(sum(found[block]) for block in trained)
    # Nobody asks for the gradient of what the first of them was given: images, or frozen features.
    of_input = {"head": slice(0, 1), "layer4": slice(0, 3, 2), "stem": slice(0, 1)}[trained[0]]
    least = sum(map(sum, found.values())) + backward - sum(found[trained[0]][of_input])
    program = programs[index]
    state = jax.eval_shape(program.transform().init, params)
    flops = compile_stage(program, Snapshot(params, stats, state)).flops
    assert least <= flops <= 1.02 * least
