"""Wrong arguments of recipes, stages, optimizers and schedules: one error for all of them."""

import re

import numpy as np
import pytest
import yaml
from commands import call

from jaxft import (
    L2SP,
    SGD,
    Adam,
    AdamW,
    EarlyStop,
    LinearProbe,
    Recipe,
    RecipeError,
    ReduceLROnPlateau,
    RMSprop,
    Stage,
    Update,
    recipe_file,
)
from jaxft.optim.schedules import CosineAnnealingLR, MultiStepLR, OneCycleLR, StepLR

STAGE = Stage("head", {"fc": 1e-3}, epochs=1)


def stage(**fields):
    return Stage(**{"name": "head", "train": {"fc": 1e-3}, "epochs": 1, **fields})


def recipe(**fields):
    return Recipe(**{"model": "resnet18", "data": "digits", "stages": (STAGE,), **fields})


MISTAKES = [
    # names
    (lambda: stage(epoch=5), "Stage 'head' has no field 'epoch': did you mean 'epochs'?"),
    (lambda: stage(epohcs=5, lr=1), "has no field 'epohcs': did you mean 'epochs'?; it has no "),
    (lambda: stage(patience=3), "has no field 'patience': it is a field of EarlyStop."),
    (lambda: stage(model="x"), "has no field 'model': it is a field of Recipe."),
    (lambda: Stage("head", epochs=1), "Stage 'head': train must be given."),
    (lambda: Stage("head", {"fc": 1.0}, 1, name="x"), "Stage 'x' is given 'name' twice."),
    (
        lambda: recipe(learning_rate=1e-3),
        "Recipe has no field 'learning_rate': learning rates belong to the",
    ),
    (lambda: recipe(batchsize=4), "Recipe has no field 'batchsize': did you mean 'batch_size'?"),
    (lambda: recipe(train={"fc": 1}), "Recipe has no field 'train': "),
    (
        lambda: Recipe("resnet18"),
        "takes no arguments without a name, not 1; model, data, stages mu",
    ),
    (lambda: Update(1.0, decay=0.1), "Update has no field 'decay'; its fields are lr, schedule, "),
    (lambda: EarlyStop(patients=3), "EarlyStop has no field 'patients': did you mean 'patience'?"),
    (lambda: L2SP(strength=1.0), "L2SP has no field 'strength'; its fields are body, head, pen"),
    # names of other libraries
    (
        lambda: SGD(lr=0.1),
        "SGD has no field 'lr': learning rates belong to the stages, Stage(..., train={'",
    ),
    (
        lambda: SGD(learning_rate=0.1),
        "SGD has no field 'learning_rate': learning rates belong to the stage",
    ),
    (
        lambda: Adam(lr=1, learning_rate=1),
        "'lr': learning rates .*; it has no field 'learning_rate': learning",
    ),
    (lambda: Adam(betas=(0.9, 0.99)), "Adam has no field 'betas': write b1=0.9, b2=0.999."),
    (lambda: Adam(beta1=0.9), "Adam has no field 'beta1': it is called b1."),
    (lambda: AdamW(epsilon=1e-6), "AdamW has no field 'epsilon': it is called eps."),
    (lambda: Adam(wd=0.1), "Adam has no field 'wd': it is called weight_decay."),
    (lambda: StepLR(SGD(), step_size=3), "StepLR takes no optimizer: the stage that names a sched"),
    (lambda: StepLR(SGD(), 3), "StepLR takes no optimizer"),
    (lambda: StepLR(optimizer=SGD(), step_size=3), "StepLR has no field 'optimizer': the stage th"),
    (lambda: ReduceLROnPlateau(Adam(), "min"), "ReduceLROnPlateau takes no optimizer"),
    (lambda: CosineAnnealingLR(T_max=3), "no field 'T_max': did you mean 't_max'?"),
    (lambda: OneCycleLR(max_lr=0.1), "OneCycleLR has no field 'max_lr': the maximum is the group"),
    # types
    (lambda: stage(epochs=2.5), "Stage 'head': epochs is 2.5; it must be a whole number or None."),
    (lambda: stage(epochs="3"), "epochs is '3'; it must be a whole number or None."),
    (lambda: stage(epochs=True), "epochs is True; it must be a whole number or None."),
    (lambda: stage(train="fc"), "train is 'fc'; it must be a mapping such as {'fc': 1e-3}."),
    (lambda: stage(train=["fc"]), "train is ['fc']; it must be a mapping such as {'fc': 1e-3}."),
    (lambda: stage(until=3), "until is 3; it must be EarlyStop, PlateauStop or None."),
    (
        lambda: recipe(stages=stage(monitor="f1")),
        "stage 'head': monitor is 'f1'; the metrics are accuracy, top5, loss. Recipe(metrics=(",
    ),
    (
        lambda: recipe(stages=stage(until=EarlyStop("val_accuracy"))),
        "monitor is 'val_accuracy'; the metrics are accuracy, top5, loss. Did you mean 'accuracy'?",
    ),
    (lambda: stage(monitor=1), "monitor is 1; it must be a string or None."),
    (lambda: recipe(metrics="m:f1"), "metrics is 'm:f1'; it must be a tuple of strings."),
    (lambda: stage(restore="first", ema="x"), "restore is 'first'; .*; ema is 'x'; it must be a n"),
    (lambda: stage(name=3), "Stage: name is 3; it must be a string."),
    (
        lambda: recipe(batch_size="32", seed=0.5),
        "batch_size is '32'; .* number; seed is 0.5; it m",
    ),
    (lambda: recipe(stages={"head": 1}), "stages is {'head': 1}; it must be a tuple of Stages."),
    (lambda: recipe(stages=["head"]), "stages is ['head']; it must be a tuple of Stages."),
    (
        lambda: recipe(optimizer="adam"),
        "optimizer is 'adam'; it must be SGD, Adam, AdamW, RMSprop, N",
    ),
    (lambda: recipe(mean=0.5), "mean is 0.5; it must be 3 numbers or None."),
    (lambda: EarlyStop(patience=2.5), "EarlyStop: patience is 2.5; it must be a whole number."),
    (lambda: MultiStepLR(3), "milestones is 3; it must be a tuple of whole numbers."),
    (lambda: LinearProbe("1"), "c is '1'; it must be a tuple of numbers."),
    (
        lambda: Adam(1e-3),
        "Adam takes no arguments without a name, not 1: learning rates belong to the ",
    ),
    (lambda: Stage("a", {"fc": 1.0}, 1, norms=None), "norms is None; it must be one of batch, "),
    (
        lambda: Stage("a", {"fc": "1e-3"}, 1),
        "the learning rate of 'fc' is '1e-3'; it must be",
    ),
    # values that torch rejects too
    (lambda: SGD(nesterov=True), "SGD: nesterov needs a momentum and no dampening."),
    (
        lambda: SGD(momentum=0.9, dampening=0.1, nesterov=True),
        "SGD: nesterov needs a momentum and no dampening.",
    ),
    (
        lambda: SGD(momentum=-1, weight_decay="x"),
        "momentum is -1; .*; weight_decay is 'x'; it must",
    ),
    (lambda: SGD(momentum=float("nan")), "momentum is nan; it must be at least 0."),
    (
        lambda: Adam(b1=1.0, b2=-0.1, eps=-1, weight_decay=-1),
        "Adam: eps is -1; it must be at least 0; weight_decay is -1; it must be at least 0; "
        "b1 is 1.0; it must be in [0, 1); b2 is -0.1; it must be in [0, 1).",
    ),
    (lambda: AdamW(b2=float("inf")), "AdamW: b2 is inf; it must be in [0, 1)."),
    (lambda: RMSprop(alpha=1.5, momentum=-1), "RMSprop: momentum is -1; .*; alpha is 1.5; it must"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_checked_dataclass_reports_wrong_arguments_in_one_error(build, message):
    with pytest.raises(RecipeError, match=re.escape(message).replace(r"\.\*", ".*")):
        build()


def test_checked_dataclass_converts_lists_single_stages_and_numpy_scalars():
    assert recipe(stages=[STAGE]) == recipe(stages=STAGE) == recipe()
    assert recipe(mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)
    assert MultiStepLR([2, 4]) == MultiStepLR(np.array([2, 4])) == MultiStepLR((2, 4))
    assert stage(class_weights=np.ones(2)).class_weights == (1.0, 1.0)
    converted = recipe(seed=np.int64(3), dropout=np.float32(0.5))
    assert (type(converted.seed), type(converted.dropout)) == (int, float)
    recipe_file.resolve(converted)
    lr = np.float32(0.5)
    rates = recipe(stages=Stage("a", {"fc": lr, "layer4": Update(lr)}, 1))
    assert rates == recipe(stages=Stage("a", {"fc": 0.5, "layer4": Update(0.5)}, 1))
    recipe_file.resolve(rates)


def test_recipe_file_errors_suggest_names(tmp_path):
    fields = {
        "model": "resnet18",
        "data": "digits",
        "learning_rate": 1e-3,
        "stages": [
            {"name": "a", "train": {"fc": 1e-3}, "epoch": 5, "until": {"patient": 3}},
        ],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError) as caught:
        recipe_file.read(file)
    for part in (
        "stages.0.epoch: Unexpected: no field 'epoch': did you mean 'epochs'?",
        "stages.0.until.EarlyStop.patient: Unexpected: no field 'patient': did you mean 'patience",
        "learning_rate: Unexpected: no field 'learning_rate': learning rates belong to the stages",
    ):
        assert part in str(caught.value)


def test_recipe_file_error_is_one_line_on_the_command_line(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from jaxft import *\nrecipe = Recipe(stages=Stage('a', {'fc': 1}, epoch=5))\n")
    done = call("finetune", file, "--workdir", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr == "RecipeError: Stage 'a' has no field 'epoch': did you mean 'epochs'?\n"
