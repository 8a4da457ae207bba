"""`parity.compare` finds each planted difference in its place, and none where training is equal."""

from dataclasses import replace

import numpy as np
import pytest
from narrow import narrowed

from jaxft import (
    SGD,
    Adam,
    LogisticRegression,
    Recipe,
    RecipeError,
    ReduceLROnPlateau,
    Stage,
    WeightsError,
    parity,
)
from jaxft.optim.schedules import StepLR

RECIPE = Recipe(
    model="resnet18",
    data="random",
    batch_size=6,
    optimizer=SGD(momentum=0.9, weight_decay=0.01),
    stages=(
        Stage("head", {"fc": 0.02}, epochs=2, schedule=StepLR(2), norms="A"),
        Stage("all", {"fc": 0.02, "*": 0.01}, epochs=1, norms="A", carry="keep"),
    ),
)
ALL_BUT_STEM = replace(RECIPE.stages[1], train={"fc": 0.02, "layer*": 0.01})
ADAM = replace(RECIPE, optimizer=Adam(), stages=RECIPE.stages[:1])


def batches():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 32, 32, 3)), rng.integers(0, 3, n)) for n in (6, 4)]


HEAD_ALONE = replace(RECIPE, stages=RECIPE.stages[:1])
PLANTED = {
    # the recipe: the part, stage and step where the difference shows first, its first name, and
    # words of the hint
    "biased running variance": (
        RECIPE,
        ("stats", "head", 1, "bn1.running_var", "unbiased variance"),
    ),
    "decay after momentum": (
        HEAD_ALONE,
        ("moments", "head", 1, "fc.weight, momentum", "whether decay joins the gradient"),
    ),
    "eps inside the root": (
        ADAM,
        ("params", "head", 1, "fc.weight", "eps in or outside the root"),
    ),
    "schedule off by one": (
        RECIPE,
        ("rates", "head", 3, "fc.weight", "when the scheduler steps"),
    ),
    "SAME padding": (RECIPE, ("outputs", "head", 1, "layer2", "padding")),
    "state not carried": (
        RECIPE,
        ("moments", "all", 1, "fc.weight, momentum", "carry='keep'"),
    ),
    "one more parameter trains": (
        replace(RECIPE, stages=(RECIPE.stages[0], ALL_BUT_STEM)),
        ("rates", "all", 1, "conv1.weight", "which parameters train"),
    ),
    "a summed loss": (
        replace(RECIPE, reduction="sum"),
        ("loss", "head", 1, "loss", "mean or sum"),
    ),
    "a penalty": (HEAD_ALONE, ("grads", "head", 1, "fc.weight", "a penalty")),
}


def compare(recipe, module, stages, **options):
    with narrowed(recipe.stages):
        return parity.compare(recipe, module, stages, batches(), **options)


@pytest.fixture(scope="module")
def planted():
    """The module `planted_differences`, which imports torch."""
    pytest.importorskip("torch")
    import planted_differences

    return planted_differences


@pytest.fixture
def module(planted):
    return planted.network()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_compare_of_equal_training_agrees(dtype, planted, module):
    before = {name: x.clone() for name, x in module.state_dict().items()}
    report = compare(RECIPE, module, planted.STAGES, dtype=dtype)
    assert report.agree, report
    assert report.steps == (4, 2)
    most = max(size for stage in report.largest.values() for size in stage.values())
    assert most < {"float64": 1e-12, "float32": 1e-4}[dtype]
    assert min(report.largest["all"][part] for part in ("outputs", "grads", "moments")) > 0
    text = str(report)
    assert text.startswith("PyTorch and jaxft agree to ")
    assert max(map(len, text.splitlines())) <= 80
    after = module.state_dict()
    assert all(x.equal(after[name]) for name, x in before.items())
    assert str(next(module.parameters()).dtype) == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANTED)
def test_compare_names_planted_difference(case, planted, module):
    recipe, (part, stage, step, name, hint) = PLANTED[case]
    plant, stages = planted.PLANTED[case]
    plant(module)
    report = compare(recipe, module, stages)
    assert (report.part, report.stage, report.step) == (part, stage, step)
    assert report.differences[0].name == name
    text = str(report)
    assert f"in stage {stage!r}" in text
    assert f"first in {part}:\n  {name}: " in text
    assert hint in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 80
    earlier = parity.report.PARTS[: parity.report.PARTS.index(part)]
    assert all(report.largest[stage][part] < 1e-12 for part in earlier)


@pytest.mark.slow
def test_difference_holds_both_values(planted, module):
    report = compare(replace(RECIPE, reduction="sum"), module, planted.STAGES)
    (found,) = report.differences
    assert found.ours == pytest.approx(6 * found.torch, rel=1e-12)
    assert found.size == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "count", "error", "message"),
    [
        (RECIPE, 1, RecipeError, "2 stages, PyTorch 1"),
        (replace(RECIPE, mixup=0.2, dropout=0.5), 2, RecipeError, "dropout, mixup"),
        (
            replace(RECIPE, stages=(Stage("probe", {"fc": LogisticRegression()}),)),
            1,
            RecipeError,
            "stage 'probe' is solved",
        ),
        (replace(RECIPE, batch_size=4), 2, RecipeError, r"batches of 4, .* of \[6, 4\]"),
        (replace(RECIPE, concat_pool=True), 2, WeightsError, "fc.0.bias, fc.0.running_mean"),
        (
            replace(
                RECIPE,
                stages=(Stage("x", {"fc": 0.1}, 1, schedule=ReduceLROnPlateau()),),
            ),
            1,
            RecipeError,
            "stage 'x' has a ReduceLROnPlateau",
        ),
    ],
)
def test_compare_refuses_recipe(recipe, count, error, message, planted, module):
    with pytest.raises(error, match=message):
        compare(recipe, module, planted.STAGES[:count])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"batches of 6, and those given are of \[\]"),
        (
            [(np.zeros((6, 3, 32, 32)), np.zeros(6, int))],
            r"are \[6, 3, 32, 32\]; .* \[b h w 3\]",
        ),
    ],
)
def test_compare_refuses_batches(given, message, planted, module):
    with pytest.raises(RecipeError, match=message):
        parity.compare(RECIPE, module, planted.STAGES, given)
