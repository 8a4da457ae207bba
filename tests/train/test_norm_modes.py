"""The five norm modes against torch, recorded in float64."""

from pathlib import Path

import jax
import numpy as np
import pytest
from float64_stages import assert_as_recorded, train

from jaxft import PatternError, Recipe, RecipeError, Stage, data, models, plan
from jaxft.data import Splits
from jaxft.devices import Devices
from jaxft.models.norm_modes import norm_modes
from jaxft.report.console import Console
from jaxft.train.stage_program import build_programs

GOLDEN = Path(__file__).parents[1] / "golden" / "norm_modes.npz"
LATE = {"fc": 0.05, "layer3": 0.02}
CASES = {
    "batch": (Stage("a", LATE, steps=4, norms="batch"),),
    "frozen_eval": (Stage("b", LATE, steps=4),),
    # fastai's freeze: the convolutions of the body stay, its norms train
    "train_all": (
        Stage("c", {"fc": 0.05, "layer3": 0.02, "**.bn*": 0.02}, steps=4, norms="train_all"),
    ),
    "frozen_batch": (Stage("d", LATE, steps=4, norms="frozen_batch"),),
    "eval": (Stage("e", LATE, steps=4, norms="eval"),),
    "mapped": (
        Stage(
            "m",
            {"fc": 0.05, "layer3.0.conv*": 0.02, "layer2": 0.02},
            steps=4,
            norms={"layer3": "batch", "*": "eval"},
        ),
    ),
    # Lightning's milestones: norms never train; `frozen_batch`, and `batch` where the layer has
    # been thawed
    "thawed": (
        Stage("head", {"fc": 0.05}, steps=4, norms="frozen_batch"),
        Stage(
            "late",
            {"fc": 0.05, "layer3.0.conv*": 0.02},
            steps=4,
            norms={"layer3": "batch", "*": "frozen_batch"},
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_norm_modes_are_torchs(case, golden):
    trained = train(CASES[case])
    of_case = {name: x for name, x in golden.items() if name.startswith(f"{case}/")}
    assert_as_recorded({f"{case}/{name}": x for name, x in trained.items()}, of_case)


@pytest.mark.slow
def test_recording_of_norm_modes_is_torchs(golden):
    pytest.importorskip("torch")
    from record_stage_steps import recorded

    assert_as_recorded(recorded(CASES), golden)


MODEL = models.create("cifar_resnet8", num_classes=10)
PARAMS, STATS = jax.eval_shape(MODEL.init, jax.random.key(0))
LAYERS = ["bn1", *(f"layer{i}.0.bn{j}" for i in (1, 2, 3) for j in (1, 2))]


def letters(train, norms):
    """Returns the mode of each layer of `LAYERS` as a letter."""
    (stage,) = plan([Stage("x", train, 1, norms=norms)], PARAMS)
    modes = norm_modes(PARAMS, STATS, stage.labels, stage.stage.norm_choices)
    assert sorted(modes) == LAYERS
    return "".join({"batch": "b", "running": "r", "batch_fixed": "f"}[modes[x]] for x in LAYERS)


@pytest.mark.parametrize(
    ("train", "norms", "expected"),
    [  # stem, then two each of layer1, layer2, layer3
        ("fc", "batch", "b bb bb bb"),
        ("fc", "frozen_eval", "r rr rr rr"),
        ("fc", "frozen_batch", "f ff ff ff"),
        ("fc", "eval", "r rr rr rr"),
        ("layer3", "batch", "b bb bb bb"),
        ("layer3", "frozen_eval", "r rr rr bb"),
        ("layer3", "frozen_batch", "f ff ff bb"),
        ("layer3", "eval", "r rr rr rr"),
        ("*", "train_all", "b bb bb bb"),
        ("*", "eval", "r rr rr rr"),
        ("**.bn*", "train_all", "b bb bb bb"),
        ("layer3.0.bn2.bias", "eval", "r rr rr rr"),  # a layer trains if any of it does
        ("layer3.0.conv*", "frozen_batch", "f ff ff ff"),  # by its own parameters, not its block's
        ("layer3", {"layer3": "batch", "*": "eval"}, "r rr rr bb"),
        ("layer2", {"layer3": "batch", "*": "eval"}, "r rr rr bb"),
        (
            "fc",
            {"layer3.0.bn1": "frozen_batch", "layer3": "batch"},
            "r rr rr fb",
        ),  # first match; the rest is `frozen_eval`
        ("fc", {"**.bn1": "batch", "*": "frozen_batch"}, "b bf bf bf"),
        ("layer3", {"layer3": "train_all"}, "r rr rr bb"),
    ],
)
def test_norm_mode_of_each_layer(train, norms, expected):
    assert letters({train: 0.1}, norms) == expected.replace(" ", "")


def test_default_norm_mode():
    (stage,) = plan([Stage("x", {"layer3": 0.1}, 1)], PARAMS)
    assert letters({"layer3": 0.1}, stage.stage.norms) == "rrrrrbb"
    assert norm_modes(PARAMS, STATS, stage.labels) == norm_modes(
        PARAMS, STATS, stage.labels, {"*": "frozen_eval"}
    )


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        (
            "train_all",
            RecipeError,
            "stage 'x': norms: with 'train_all' all .*, and 5 are frozen, such as bn1",
        ),
        (
            {"layer1": "train_all"},
            RecipeError,
            "stage 'x': .* and 2 are frozen, such as layer1.0.bn1",
        ),
        (
            {"layer4": "batch"},
            PatternError,
            "stage 'x': norms: among the norm layers, pattern 'layer4' matches .*\n.*'layer3'",
        ),
        ({"fc": "batch"}, PatternError, "stage 'x': norms: among the norm layers, pattern 'fc'"),
        (
            {"*": "batch", "layer3": "eval"},
            PatternError,
            "stage 'x': norms: .*'layer3' is never reached: '\\*' before",
        ),
    ],
)
def test_norm_modes_that_do_not_fit_are_refused(norms, error, message):
    stage = Stage("x", {"layer3": 0.1, "fc": 0.1}, 1, norms=norms)
    recipe = Recipe(model=MODEL.name, data="random", stages=(stage,))
    source = data.arrays(np.zeros((1, 8, 8, 3), np.uint8), [0], classes="0123456789")
    with pytest.raises(error, match=message):
        build_programs(recipe, MODEL, Splits(source, source), Devices(), (PARAMS, STATS))


@pytest.mark.parametrize("norms", ["B", {"layer3": "b", "*": "batch"}, {"*": "running"}])
def test_unknown_norm_mode_is_refused(norms):
    with pytest.raises(
        RecipeError, match=r"stage 'x': norms has '\w+'; .* batch, frozen_eval, train_all"
    ):
        Stage("x", {"*": 0.1}, 1, norms=norms)


def test_stage_table_shows_norm_modes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    train = {"fc": 1e-3, "layer3.0.bn1": 1e-4, "layer3": 1e-4}
    (stage,) = plan(
        [Stage("x", train, 1, norms={"layer3": "eval", "layer2": "frozen_batch", "*": "batch"})],
        PARAMS,
    )
    modes = norm_modes(PARAMS, STATS, stage.labels, stage.stage.norm_choices)
    Console().stage(stage, "Stage 1 of 1: x", "1 MFLOP a step", PARAMS, modes)
    printed = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split("  ")[-1].strip() for line in printed if line.strip()}
    assert cells["fc"] == "-"
    assert cells["layer3.0.bn1"] == "running (1)"
    assert cells["layer3"] == "running (1)"
    assert cells["frozen"] == "batch (3), batch_fixed (2)"
