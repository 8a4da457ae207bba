"""`parity.compare` reports no difference in equal trainings, and finds each planted difference."""

from dataclasses import replace

import numpy as np
import pytest
from narrow import narrowed

from jaxft import (
    SGD,
    Adam,
    LinearProbe,
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
        Stage("head", {"fc": 0.02}, epochs=2, schedule=StepLR(2), norms="batch"),
        Stage("all", {"fc": 0.02, "*": 0.01}, epochs=1, norms="batch", carry="keep"),
    ),
)
ALL_BUT_STEM = replace(RECIPE.stages[1], train={"fc": 0.02, "layer*": 0.01})
ADAM = replace(RECIPE, optimizer=Adam(), stages=RECIPE.stages[:1])


def batches():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 32, 32, 3)), rng.integers(0, 3, n)) for n in (6, 4)]


HEAD_ONLY = replace(RECIPE, stages=RECIPE.stages[:1])
PLANTED = {
    # case: (recipe, (part, stage and step of the first difference, its first array, words of the
    # hint))
    "biased running variance": (
        RECIPE,
        ("stats", "head", 1, "bn1.running_var", "unbiased variance"),
    ),
    "decay after momentum": (
        HEAD_ONLY,
        ("moments", "head", 1, "fc.weight, momentum", "whether weight decay is added to"),
    ),
    "eps inside the root": (
        ADAM,
        ("params", "head", 1, "fc.weight", "eps inside or outside the root"),
    ),
    "schedule off by one": (
        RECIPE,
        ("lr", "head", 3, "fc.weight", "when the scheduler steps"),
    ),
    "SAME padding": (RECIPE, ("outputs", "head", 1, "layer2", "padding")),
    "state not carried": (
        RECIPE,
        ("moments", "all", 1, "fc.weight, momentum", "carry='keep'"),
    ),
    "one more parameter trains": (
        replace(RECIPE, stages=(RECIPE.stages[0], ALL_BUT_STEM)),
        ("lr", "all", 1, "conv1.weight", "which parameters train"),
    ),
    "a summed loss": (
        replace(RECIPE, reduction="sum"),
        ("loss", "head", 1, "loss", "mean or sum"),
    ),
    "a penalty": (HEAD_ONLY, ("grads", "head", 1, "fc.weight", "a penalty")),
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
    worst = max(size for stage in report.largest.values() for size in stage.values())
    assert worst < {"float64": 1e-12, "float32": 1e-4}[dtype]
    assert min(report.largest["all"][part] for part in ("outputs", "grads", "moments")) > 0
    text = str(report)
    assert text.startswith("PyTorch and jaxft agree to ")
    assert max(map(len, text.splitlines())) <= 80
    after = module.state_dict()
    assert all(x.equal(after[name]) for name, x in before.items())
    assert str(next(module.parameters()).dtype) == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANTED)
def test_compare_reports_the_first_difference(case, planted, module):
    recipe, (part, stage, step, name, hint) = PLANTED[case]
    change, stages = planted.PLANTED[case]
    change(module)
    report = compare(recipe, module, stages)
    assert (report.part, report.stage, report.step) == (part, stage, step)
    assert report.differences[0].name == name
    text = str(report)
    assert f"in stage {stage!r}" in text
    assert f"first in {part}:\n  {name}: " in text
    assert hint in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 80
    earlier_parts = parity.report.PARTS[: parity.report.PARTS.index(part)]
    assert all(report.largest[stage][part] < 1e-12 for part in earlier_parts)


@pytest.mark.slow
def test_difference_holds_both_values(planted, module):
    report = compare(replace(RECIPE, reduction="sum"), module, planted.STAGES)
    (difference,) = report.differences
    assert difference.ours == pytest.approx(6 * difference.torch, rel=1e-12)
    assert difference.size == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "count", "error", "message"),
    [
        (RECIPE, 1, RecipeError, "2 stages, but `stages` has 1"),
        (replace(RECIPE, mixup=0.2, dropout=0.5), 2, RecipeError, "dropout, mixup"),
        (
            replace(RECIPE, stages=(Stage("probe", {"fc": LinearProbe()}),)),
            1,
            RecipeError,
            "stage 'probe' is a linear probe",
        ),
        (replace(RECIPE, batch_size=4), 2, RecipeError, r"batches of 4, but .* of \[6, 4\]"),
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
    ("batches", "message"),
    [
        ([], r"batches of 6, but `batches` has batches of \[\]"),
        (
            [(np.zeros((6, 3, 32, 32)), np.zeros(6, int))],
            r"are \[6, 3, 32, 32\]; .* \[b h w 3\]",
        ),
    ],
)
def test_compare_refuses_batches(batches, message, planted, module):
    with pytest.raises(RecipeError, match=message):
        parity.compare(RECIPE, module, planted.STAGES, batches)
