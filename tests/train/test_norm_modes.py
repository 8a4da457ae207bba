"""The five norm modes against torch, recorded in float64."""

from pathlib import Path

import jax
import numpy as np
import pytest
from float64_stages import assert_as_recorded, train

from jaxft import PatternError, Recipe, RecipeError, Stage, data, models, plan
from jaxft.distributed import Devices
from jaxft.models.norm_modes import mode_names, norm_modes
from jaxft.report.console import Console
from jaxft.train.stage_program import stage_program

GOLDEN = Path(__file__).parents[1] / "golden" / "norm_modes.npz"
LATE = {"fc": 0.05, "layer3": 0.02}
CASES = {
    "A": (Stage("a", LATE, steps=4, norms="A"),),
    "B": (Stage("b", LATE, steps=4),),
    # fastai's freeze: the convolutions of the body stay, its norms train
    "C": (Stage("c", {"fc": 0.05, "layer3": 0.02, "**.bn*": 0.02}, steps=4, norms="C"),),
    "D": (Stage("d", LATE, steps=4, norms="D"),),
    "E": (Stage("e", LATE, steps=4, norms="E"),),
    "mapped": (
        Stage(
            "m",
            {"fc": 0.05, "layer3.0.conv*": 0.02, "layer2": 0.02},
            steps=4,
            norms={"layer3": "A", "*": "E"},
        ),
    ),
    # Lightning's milestones: norms never train; D, and A where the layer has been thawed
    "thawed": (
        Stage("head", {"fc": 0.05}, steps=4, norms="D"),
        Stage(
            "late", {"fc": 0.05, "layer3.0.conv*": 0.02}, steps=4, norms={"layer3": "A", "*": "D"}
        ),
    ),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as recorded:
        return dict(recorded)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_norm_modes_are_torchs(case, golden, monkeypatch):
    trained = train(CASES[case], monkeypatch)
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
    """Returns the letter of each layer of `LAYERS`, as the console prints it."""
    (stage,) = plan([Stage("x", train, 1, norms=norms)], PARAMS)
    modes = norm_modes(PARAMS, STATS, stage.labels, stage.stage.norm_choices)
    names = mode_names(PARAMS, stage.labels, modes)
    assert sorted(names) == sorted(modes) == LAYERS
    for layer, name in names.items():
        assert name.split()[1] == modes[layer]
    return "".join(names[layer][0] for layer in LAYERS)


@pytest.mark.parametrize(
    ("train", "norms", "expected"),
    [  # stem, then two each of layer1, layer2, layer3
        ("fc", "A", "A AA AA AA"),
        ("fc", "B", "B BB BB BB"),
        ("fc", "D", "D DD DD DD"),
        ("fc", "E", "B BB BB BB"),  # frozen layers are in B
        ("layer3", "A", "A AA AA CC"),  # trained layers in C, except in E
        ("layer3", "B", "B BB BB CC"),
        ("layer3", "D", "D DD DD CC"),
        ("layer3", "E", "B BB BB EE"),
        ("*", "C", "C CC CC CC"),
        ("*", "E", "E EE EE EE"),
        ("**.bn*", "C", "C CC CC CC"),
        ("layer3.0.bn2.bias", "E", "B BB BB BE"),  # a layer trains if any of it does
        ("layer3.0.conv*", "D", "D DD DD DD"),  # by its own parameters, not its block's
        ("layer3", {"layer3": "A", "*": "E"}, "B BB BB CC"),
        ("layer2", {"layer3": "A", "*": "E"}, "B BB EE AA"),
        ("fc", {"layer3.0.bn1": "D", "layer3": "A"}, "B BB BB DA"),  # first match; the rest is B
        ("fc", {"**.bn1": "A", "*": "D"}, "A AD AD AD"),
        ("layer3", {"layer3": "C"}, "B BB BB CC"),
    ],
)
def test_norm_mode_of_each_layer(train, norms, expected):
    assert letters({train: 0.1}, norms) == expected.replace(" ", "")


def test_default_norm_mode():
    (stage,) = plan([Stage("x", {"layer3": 0.1}, 1)], PARAMS)
    assert letters({"layer3": 0.1}, stage.stage.norms) == "BBBBBCC"
    assert norm_modes(PARAMS, STATS, stage.labels) == norm_modes(
        PARAMS, STATS, stage.labels, {"*": "B"}
    )


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        ("C", RecipeError, "stage 'x': norms: in mode C all .*, and 5 are frozen, such as bn1"),
        ({"layer1": "C"}, RecipeError, "stage 'x': .* and 2 are frozen, such as layer1.0.bn1"),
        (
            {"layer4": "A"},
            PatternError,
            "stage 'x': norms: among the norm layers, pattern 'layer4' matches .*\n.*'layer3'",
        ),
        ({"fc": "A"}, PatternError, "stage 'x': norms: among the norm layers, pattern 'fc'"),
        (
            {"*": "A", "layer3": "E"},
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
        stage_program(0, *plan([stage], PARAMS), recipe, MODEL, source, Devices(), (PARAMS, STATS))


@pytest.mark.parametrize("norms", ["F", {"layer3": "b", "*": "A"}, {"*": "batch"}])
def test_unknown_norm_mode_is_refused(norms):
    with pytest.raises(RecipeError, match=r"stage 'x': norms has '\w+'; .* A, B, C, D, E"):
        Stage("x", {"*": 0.1}, 1, norms=norms)


def test_stage_table_shows_norm_modes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    train = {"fc": 1e-3, "layer3.0.bn1": 1e-4, "layer3": 1e-4}
    (stage,) = plan([Stage("x", train, 1, norms={"layer3": "E", "layer2": "D", "*": "A"})], PARAMS)
    modes = norm_modes(PARAMS, STATS, stage.labels, stage.stage.norm_choices)
    names = mode_names(PARAMS, stage.labels, modes)
    Console().stage(stage, "Stage 1 of 1: x", "1 MFLOP a step", PARAMS, names)
    printed = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split("  ")[-1].strip() for line in printed if line.strip()}
    assert cells["fc"] == "-"
    assert cells["layer3.0.bn1"] == "E running (1)"
    assert cells["layer3"] == "E running (1)"
    assert cells["frozen"] == "A batch (3), D batch_fixed (2)"
