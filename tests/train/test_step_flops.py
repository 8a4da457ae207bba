"""FLOPs of a step are the least that its stage needs, counted product by product."""

import itertools
import math
from dataclasses import dataclass
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
from jaxft.models import create, register, registry
from jaxft.models.networks.convnext import ConvNeXt, ConvNeXtConfig
from jaxft.models.networks.vit import ViT, ViTConfig
from jaxft.models.nnx_adapter import NNXModel
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.compiled_stage import flops as count_flops
from jaxft.train.stage_program import build_programs

SIDE, BATCH = 224, 16
SHORT_VIT = "vit_base_patch16_224 of two blocks"


@dataclass(frozen=True)
class Case:
    """A network, its images, and the first blocks of its stages."""

    model: str
    starts: tuple[str, str, str]
    skipped: dict[str, slice]
    """By first trained block: its products whose gradient with regard to an input nobody needs, as
    the input is images or frozen features."""


CASES = {
    "resnet18": Case(
        "resnet18", ("head", "layer4", "stem"),
        {"head": slice(0, 1), "layer4": slice(0, 3, 2), "stem": slice(0, 1)},
    ),
    # The first product of a ViT's block takes the output of a norm layer, which trains.
    # In a network narrower than ViT-B, softmax, GELU and norms alone are more than 2 %.
    "vit": Case(
        SHORT_VIT, ("head", "blocks.1", "stem"),
        {"head": slice(0, 1), "blocks.1": slice(0), "stem": slice(0, 1)},
    ),
}  # fmt: skip


def make_recipe(case):
    model = create(case.model, num_classes=2)
    starts = [model.blocks.index(start) for start in case.starts]
    stages = (
        Stage(str(i), dict.fromkeys(sum(model.block_patterns[i:], ()), 1e-3), epochs=1)
        for i in starts
    )
    return Recipe(
        model=case.model, data="given:", optimizer=SGD(momentum=0.9), batch_size=BATCH,
        image_size=SIDE, resize_size=SIDE, cache_mib=0, stages=tuple(stages),
    )  # fmt: skip


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


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def stages(request):
    """The case, the programs of its stages, their start, and the products of each block."""
    case = request.param
    register(SHORT_VIT, ViT, ViTConfig(width=768, depth=2, num_heads=12))
    recipe = make_recipe(case).expecting(data.Preprocessing())
    model = recipe.network(2)
    programs, trees = build(recipe, model)
    x, found = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.float32), {}
    for block in model.blocks:
        forward = partial(model.apply, norms="running", first=block, last=block)
        found[block] = list(products(jax.make_jaxpr(forward)(*trees, x).jaxpr))
        x = jax.eval_shape(forward, *trees, x)[0]
    yield case, programs, trees, found
    registry._NETWORKS.pop(SHORT_VIT)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_step_flops_are_the_least(stages, index):
    """Forward of all blocks, backward of trained ones; the rest is within 2 %."""
    case, programs, (params, stats), found = stages
    start = case.starts[index]
    trained = [*found][[*found].index(start) :]
    backward = 2 * sum(sum(found[block]) for block in trained)
    least = sum(map(sum, found.values())) + backward - sum(found[start][case.skipped[start]])
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
    recipe = Recipe(
        model="convnext", data="given:", optimizer=SGD(momentum=0.9), batch_size=BATCH,
        image_size=64, resize_size=64, cache_mib=0, stages=(Stage("one", train, epochs=1),),
    )  # fmt: skip
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
