"""FLOPs of a step are the least that its stage needs, counted product by product."""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxft import SGD, Recipe, Stage, combine, data, label, partition
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.devices import Devices
from jaxft.models.networks.convnext import ConvNeXt, ConvNeXtConfig
from jaxft.models.nnx_adapter import NNXModel
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.compiled_stage import flops as count_flops
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


def build(recipe, model):
    """Returns the programs of the stages, and the shapes of their start."""
    side = recipe.image_size
    images = data.arrays(np.zeros((32, side, side, 3), np.uint8), np.arange(32) % 2, "ab")
    trees = jax.eval_shape(model.init, jax.random.key(0))
    return build_programs(recipe, model, Splits(images, images), Devices(), trees), trees


def step_flops(program, params, stats):
    state = jax.eval_shape(program.transform().init, params)
    return compile_stage(program, Snapshot(params, stats, state)).flops


@pytest.fixture(scope="module")
def stages():
    """The programs of the stages, their start, and the products of each block."""
    recipe = RECIPE.expecting(data.Preprocessing())
    model = recipe.network(2)
    programs, trees = build(recipe, model)
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
    assert least <= step_flops(programs[index], params, stats) <= 1.02 * least


CONVNEXT = NNXModel("convnext", ConvNeXt, ConvNeXtConfig((1, 1), (64, 128), num_classes=2))


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "index"), [(4, 0), (2, 1), (0, 2)])
def test_convnext_step_flops_are_the_least(frozen, index):
    """Forward of the frozen blocks, and gradients of the others from features, within 2 %.

    Norms, GELU and depthwise convolutions are no products, so XLA counts both sides.
    """
    blocks, patterns = CONVNEXT.blocks, CONVNEXT.block_patterns
    train = ({"head.fc": 1e-3}, {"head": 1e-3, "stages.1": 1e-4}, {"*": 1e-4})[index]
    recipe = replace(RECIPE, image_size=64, resize_size=64, stages=(Stage("one", train, epochs=1),))
    (program,), (params, stats) = build(recipe.expecting(data.Preprocessing()), CONVNEXT)
    apply = partial(CONVNEXT.apply, norms="running")
    x, least = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32), 0
    if frozen:
        prefix = jax.jit(lambda *trees: apply(*trees, last=blocks[frozen - 1])[0])
        least += count_flops(prefix.lower(params, stats, x).compile())
        x = jax.eval_shape(prefix, params, stats, x)
    labels = label(params, dict.fromkeys(sum(patterns[frozen:], ()), "trained"))
    trained, others = partition(params, labels)

    def loss(trained, others, x):
        logits = apply(combine(trained, others), stats, x, first=blocks[frozen])[0]
        return jax.nn.log_softmax(logits)[:, 0].mean()

    gradients = jax.jit(jax.value_and_grad(loss))
    least += count_flops(gradients.lower(trained, others, x).compile())
    assert least <= step_flops(program, params, stats) <= 1.02 * least
