"""Precision of float32 products in every program of a stage."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxft import Recipe, Stage, data, models
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Splits
from jaxft.devices import Devices
from jaxft.matmul_precision import with_precision
from jaxft.train.eval_step import eval_step
from jaxft.train.stage_program import build_programs

MODEL = models.create("cifar_resnet8", num_classes=4)
BATCH = Batch(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32), np.ones(4, bool))
RECIPE = Recipe(
    model=MODEL.name, data="given", batch_size=4, image_size=32, augment="none",
    stages=(Stage("all", {"*": 0.1}, 1),),
)  # fmt: skip


def precisions(jaxpr):
    """Returns the different precisions of a jaxpr's products."""
    return set(re.findall(r" precision=\(?(?:Precision\.)?(\w+)", str(jaxpr)))


@pytest.mark.parametrize(("precision", "name"), [("default", "None"), ("highest", "HIGHEST")])
def test_matmul_precision_of_step_and_evaluation(precision, name):
    recipe = dataclasses.replace(RECIPE, matmul_precision=precision)
    start = MODEL.init(jax.random.key(0))
    images = Splits(*[data.arrays(*BATCH[:2], classes=list("abcd"))] * 2)
    (program,) = build_programs(recipe, MODEL, images, Devices(), start)
    state, frozen = program.state(Snapshot(*start, program.transform().init(start[0])))
    step = jax.make_jaxpr(program.train_step())(state, frozen, BATCH, np.int32(0))
    assert precisions(step) == {name}
    evaluate = eval_step(MODEL, recipe.preprocessing, precision=precision)
    assert precisions(jax.make_jaxpr(evaluate)(*start, BATCH)) == {name}


def test_with_precision_includes_gradients_written_by_hand():
    @jax.custom_vjp
    def product(x, y):
        return x @ y

    product.defvjp(lambda x, y: (x @ y, (x, y)), lambda xy, g: (g @ xy[1].T, xy[0].T @ g))
    gradient = with_precision(jax.grad(lambda x, y: product(x, y).sum(), (0, 1)), "highest")
    x = np.ones((2, 2), np.float32)
    assert precisions(jax.make_jaxpr(gradient)(x, x)) == {"HIGHEST"}
