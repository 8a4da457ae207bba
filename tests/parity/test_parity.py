"""`parity.compare` reports no difference in equal trainings, and finds each planted difference."""

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

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_network import ResNet  # noqa: E402

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


def begin_head(module, _, make=torch.optim.SGD):
    module.train()
    for name, p in module.named_parameters():
        p.requires_grad = name.startswith("fc.")
    if make is torch.optim.SGD:
        return make(module.fc.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    return make(module.fc.parameters(), lr=0.02)


def unfreeze_body(module):
    for p in module.parameters():
        p.requires_grad = True
    return [p for name, p in module.named_parameters() if not name.startswith("fc.")]


def extend_optimizer(module, optimizer):
    optimizer.add_param_group({"params": unfreeze_body(module), "lr": 0.01})
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    optimizer.param_groups[0]["lr"] = 0.02
    return optimizer


def renew_optimizer(module, _):
    groups = [{"params": module.fc.parameters()}, {"params": unfreeze_body(module), "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def late_step_lr(optimizer):
    scheduler = step_lr(optimizer)
    optimizer.step()  # changes nothing yet, and avoids torch's warning
    scheduler.step()
    return scheduler


STAGES = [parity.TorchStage(begin_head, scheduler=step_lr), parity.TorchStage(extend_optimizer)]


class BiasedNorm(nn.BatchNorm2d):
    """Batch norm that updates the running variance with the biased variance, as Flax does."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


class DecayAfterMomentum(torch.optim.Optimizer):
    """SGD that adds weight decay to the update instead of the gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum_buffer"] = 0.9 * state.get("momentum_buffer", 0.0) + p.grad
                p -= group["lr"] * (state["momentum_buffer"] + 0.01 * p)


class EpsInsideRoot(torch.optim.Optimizer):
    """Adam that divides by sqrt(v + eps)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                state["exp_avg"] = 0.9 * state.get("exp_avg", 0.0) + 0.1 * p.grad
                squares = 0.999 * state.get("exp_avg_sq", 0.0) + 0.001 * p.grad.square()
                state["exp_avg_sq"] = squares
                mean, square = state["exp_avg"] / (1 - 0.9**t), squares / (1 - 0.999**t)
                p -= group["lr"] * mean / (square + 1e-8).sqrt()


class SamePadding(nn.Conv2d):
    """Strided convolution with TensorFlow's SAME padding: none at the top and left."""

    def forward(self, x):
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, self.weight, None, self.stride)


def use_biased_norms(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = BiasedNorm


def use_same_padding(module):
    module.layer2[0].conv1.__class__ = SamePadding


def head_stage(make):
    return [parity.TorchStage(lambda module, _: begin_head(module, _, make), scheduler=step_lr)]


def unchanged(module):
    pass


PLANTED = {
    # ((change of the module, torch stages, recipe),
    #  (part, stage and step of the first difference, its first array, words of the hint))
    "biased running variance": (
        (use_biased_norms, STAGES, RECIPE),
        ("stats", "head", 1, "bn1.running_var", "unbiased variance"),
    ),
    "decay after momentum": (
        (unchanged, head_stage(DecayAfterMomentum), replace(RECIPE, stages=RECIPE.stages[:1])),
        ("moments", "head", 1, "fc.weight, momentum", "whether weight decay is added to"),
    ),
    "eps inside the root": (
        (unchanged, head_stage(EpsInsideRoot), ADAM),
        ("params", "head", 1, "fc.weight", "eps inside or outside the root"),
    ),
    "schedule off by one": (
        (unchanged, [parity.TorchStage(begin_head, scheduler=late_step_lr), STAGES[1]], RECIPE),
        ("rates", "head", 3, "fc.weight", "when the scheduler steps"),
    ),
    "SAME padding": (
        (use_same_padding, STAGES, RECIPE),
        ("outputs", "head", 1, "layer2", "padding"),
    ),
    "state not carried": (
        (unchanged, [STAGES[0], parity.TorchStage(renew_optimizer)], RECIPE),
        ("moments", "all", 1, "fc.weight, momentum", "carry='keep'"),
    ),
    "one more parameter trains": (
        (unchanged, STAGES, replace(RECIPE, stages=(RECIPE.stages[0], ALL_BUT_STEM))),
        ("rates", "all", 1, "conv1.weight", "which parameters train"),
    ),
    "a summed loss": (
        (unchanged, STAGES, replace(RECIPE, reduction="sum")),
        ("loss", "head", 1, "loss", "mean or sum"),
    ),
    "a penalty": (
        (
            unchanged,
            [replace(STAGES[0], penalty=lambda module: 0.1 * module.fc.weight.square().sum())],
            replace(RECIPE, stages=RECIPE.stages[:1]),
        ),
        ("grads", "head", 1, "fc.weight", "a penalty"),
    ),
}


def compare(recipe, module, stages, **options):
    with narrowed(recipe.stages):
        return parity.compare(recipe, module, stages, batches(), **options)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return ResNet()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_compare_equal_trainings_agree(dtype, module):
    before = {name: x.clone() for name, x in module.state_dict().items()}
    report = compare(RECIPE, module, STAGES, dtype=dtype)
    assert report.agree, report
    assert report.steps == (4, 2)
    worst = max(size for stage in report.largest.values() for size in stage.values())
    assert worst < {"float64": 1e-12, "float32": 1e-4}[dtype]
    assert min(report.largest["all"][part] for part in ("outputs", "grads", "moments")) > 0
    text = str(report)
    assert text.startswith("PyTorch and jaxft agree to ")
    assert max(map(len, text.splitlines())) <= 80
    after = module.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert next(module.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_compare_reports_the_first_difference(planted, module):
    (change, stages, recipe), (part, stage, step, name, hint) = PLANTED[planted]
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
def test_difference_holds_both_values(module):
    report = compare(replace(RECIPE, reduction="sum"), module, STAGES)
    (difference,) = report.differences
    assert difference.ours == pytest.approx(6 * difference.torch, rel=1e-12)
    assert difference.size == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "stages", "error", "message"),
    [
        (RECIPE, STAGES[:1], RecipeError, "2 stages, but `stages` has 1"),
        (replace(RECIPE, mixup=0.2, dropout=0.5), STAGES, RecipeError, "dropout, mixup"),
        (
            replace(RECIPE, stages=(Stage("probe", {"fc": LogisticRegression()}),)),
            STAGES[:1],
            RecipeError,
            "stage 'probe' is solved",
        ),
        (replace(RECIPE, batch_size=4), STAGES, RecipeError, r"batches of 4, but .* of \[6, 4\]"),
        (replace(RECIPE, concat_pool=True), STAGES, WeightsError, "fc.0.bias, fc.0.running_mean"),
        (
            replace(
                RECIPE,
                stages=(Stage("x", {"fc": 0.1}, 1, schedule=ReduceLROnPlateau()),),
            ),
            STAGES[:1],
            RecipeError,
            "stage 'x' has a ReduceLROnPlateau",
        ),
    ],
)
def test_compare_rejects_recipes(recipe, stages, error, message, module):
    with pytest.raises(error, match=message):
        compare(recipe, module, stages)


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
def test_compare_rejects_batches(batches, message, module):
    with pytest.raises(RecipeError, match=message):
        parity.compare(RECIPE, module, STAGES, batches)
