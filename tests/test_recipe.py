"""Recipes: reading, saving, comparing, and errors."""

import dataclasses
import math
import re

import optax
import pytest

from jaxft import (
    EMA,
    L2SP,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    EarlyStop,
    Focal,
    LinearProbe,
    Lion,
    NAdam,
    Optax,
    PlateauStop,
    RAdam,
    Recipe,
    RecipeError,
    ReduceLROnPlateau,
    RMSprop,
    Stage,
    Update,
    WiSE,
    models,
)
from jaxft.cli.recipe_options import read_recipe
from jaxft.data import Preprocessing
from jaxft.optim.schedules import (
    Constant,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    FastaiOneCycle,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SlantedTriangular,
    StepLR,
    Warmup,
)
from jaxft.recipe_differences import differences
from jaxft.recipe_file import read, resolve, save

OPTAX = "optax:softmax_cross_entropy"  # a loss by name
RECIPE = Recipe(
    model="resnet18",
    data="folder:ants",
    weights="resnet18.safetensors",
    stages=(
        Stage(
            "head",
            train={"fc": 1e-3},
            epochs=5,
            until=EarlyStop("loss", patience=2, min_delta=0.01, min_epochs=2, mode="min"),
            norms={"layer4": "batch", "*": "eval"},
            anchor=L2SP(0.2, 0.0),
            class_weights=(1.0, 2.5),
            ema=0.99,
            batch_size=8,
            augment="flip",
            loss=OPTAX,
        ),
        Stage(
            "plateau",
            train={"fc": 1e-3},
            steps=50,
            max_minutes=2.5,
            schedule=ReduceLROnPlateau(),
            until=PlateauStop(1),
            norms="frozen_batch",
            clip_norm=1.0,
            clip_value=0.5,
            accumulate=2,
        ),
        Stage(
            "late",
            train={"fc": 1e-3, "layer4.*": 1e-4},
            epochs=5,
            carry="keep",
            schedule_time="continue",
            ema=EMA(0.9998, every=32, warmup=True),
            finish=WiSE((0.0, 0.5)),
        ),
        Stage("probe", train={"fc": LinearProbe((0.1, 2.0))}, restore="last"),
        Stage(
            "all",
            train={
                "fc": Update(1e-3, OneCycleLR(pct_start=0.25), AdamW(), weight_decay=0.1),
                "layer4": Update(1e-4, ReduceLROnPlateau("max", patience=2)),
                "*": 1e-5,
            },
            epochs=9,
            schedule=Warmup(2, then=CosineAnnealingLR()),
            optimizer=RMSprop(centered=True),
        ),
        *(
            Stage(repr(s), {"*": 1.0}, 1, schedule=s)
            for s in (
                Constant(),
                StepLR(7),
                MultiStepLR((3, 5)),
                ExponentialLR(0.9),
                PolynomialLR(),
                LinearLR(),
                FastaiOneCycle(),
                SlantedTriangular(),
                CosineAnnealingWarmRestarts(3, t_mult=2),
                CyclicLR(4, mode="triangular2"),
                LambdaLR("math:exp2", by="step"),
            )
        ),
    ),
)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        dataclasses.replace(RECIPE, optimizer=SGD()),
        dataclasses.replace(RECIPE, optimizer=Adam(weight_decay=1e-4), resize_size=None),
        dataclasses.replace(RECIPE, optimizer=AdamW(amsgrad=True), shots=3),
        dataclasses.replace(RECIPE, optimizer=NAdam(decoupled_weight_decay=True)),
        dataclasses.replace(RECIPE, optimizer=RAdam(b2=0.99)),
        dataclasses.replace(RECIPE, optimizer=Adagrad(lr_decay=0.1)),
        dataclasses.replace(RECIPE, optimizer=Lion()),
        dataclasses.replace(
            RECIPE, optimizer=Optax("optax:scale_by_adam", {"nesterov": True, "eps": 1e-6})
        ),
        dataclasses.replace(
            RECIPE,
            optimizer=Optax("optax.contrib.muon", {"nesterov": False, "mu_dtype": "bfloat16"}),
        ),
        dataclasses.replace(
            RECIPE,
            train_split="train[:80%/class]",
            val_split="train[80%:/class]+test",
            on_bad_image="skip",
            augment="trivialaugment",
            resize_mode="squash",
            random_erasing=0.1,
            mixup=0.2,
            cutmix=1.0,
            loss=Focal(1.5, 0.25),
            metrics=("optax:safe_softmax_cross_entropy",),
            label_smoothing=0.1,
            balance="sampling",
            drop_last=True,
            cache_mib=0,
            tta="flip",
        ),
    ],
    ids=[
        "plain",
        "sgd",
        "adam",
        "adamw",
        "nadam",
        "radam",
        "adagrad",
        "lion",
        "optax",
        "muon",
        "data",
    ],
)
def test_save_and_read_return_an_equal_recipe(recipe, tmp_path):
    save(recipe, tmp_path / "recipe.yaml")
    assert read(tmp_path / "recipe.yaml") == recipe
    assert resolve(recipe) == recipe


def test_command_line_overrides_the_strengths_of_a_linear_probe(tmp_path):
    stage = Stage("probe", train={"fc": LinearProbe()})
    save(dataclasses.replace(RECIPE, stages=(stage,)), tmp_path / "recipe.yaml")
    recipe = read_recipe(tmp_path / "recipe.yaml", ["--stages.0.train.fc.c", "0.5", "2"])
    assert recipe.stages[0].linear_probe == LinearProbe((0.5, 2.0))


@pytest.mark.parametrize(
    ("ema", "options", "expected"),
    [
        (None, ["--stages.0.ema", "0.99"], 0.99),
        (0.9, ["--stages.0.ema", "0.99"], 0.99),
        (0.9, ["--stages.0.ema", "None"], None),
        (0.9, ["--batch-size", "8"], 0.9),
        (EMA(0.9, every=4), ["--stages.0.ema.warmup", "True"], EMA(0.9, every=4, warmup=True)),
        (EMA(0.9, every=4), ["--stages.0.ema.decay", "0.99"], EMA(0.99, every=4)),
        (EMA(0.9, every=4), ["--batch-size", "8"], EMA(0.9, every=4)),
    ],
    ids=str,
)
def test_command_line_overrides_ema(ema, options, expected, tmp_path):
    stage = dataclasses.replace(RECIPE.stages[0], ema=ema)
    save(dataclasses.replace(RECIPE, stages=(stage,)), tmp_path / "recipe.yaml")
    recipe = read_recipe(tmp_path / "recipe.yaml", options)
    assert recipe.stages[0].ema == expected


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("bce", ["--loss", "cross_entropy", "--stages.0.loss", "bce"], ("cross_entropy", "bce")),
        ("bce", ["--loss", OPTAX, "--stages.0.loss", "None"], (OPTAX, None)),
        ("bce", ["--batch-size", "8"], ("bce", OPTAX)),
        (Focal(2.0, 0.25), ["--loss.gamma", "1"], (Focal(1.0, 0.25), OPTAX)),
        (Focal(2.0, 0.25), ["--loss.alpha", "None"], (Focal(), OPTAX)),
    ],
    ids=str,
)
def test_command_line_overrides_loss(loss, options, expected, tmp_path):
    save(dataclasses.replace(RECIPE, loss=loss), tmp_path / "recipe.yaml")
    recipe = read_recipe(tmp_path / "recipe.yaml", options)
    assert (recipe.loss, recipe.stages[0].loss) == expected


def test_command_line_names_metrics(tmp_path):
    save(RECIPE, tmp_path / "recipe.yaml")
    metrics = (OPTAX, "optax:safe_softmax_cross_entropy")
    recipe = read_recipe(tmp_path / "recipe.yaml", ["--metrics", *metrics])
    assert recipe.metrics == metrics


def test_read_python_file(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from jaxft import *\n"
        "recipe = Recipe(model='resnet18', data='digits', stages=(Stage('a', {'*': 1.0}, 1),))\n"
    )
    assert read(config).stages == (Stage("a", {"*": 1.0}, 1),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, "absent.py: no such recipe"),
        ("empty.py", "", "empty.py defines no recipe"),
        ("broken.yaml", "a: [", "broken.yaml is no YAML"),
        ("list.yaml", "- 1", "list.yaml holds no fields of a recipe"),
        ("empty.yaml", "", "empty.yaml holds no fields of a recipe"),
        ("ends.py", "\nraise SystemExit('no images')", "ends.py:2: SystemExit: no images"),
        ("wrong.yaml", "model: 3\nbacth: 4\n",
         "(?s)model: Input should be a valid string.*data: Field required.*bacth: Unexpected"),
        ("stage.yaml", "model: m\ndata: d\nstages: [{name: a, train: {fc: -1}, epochs: 1}]",
         "stages.0: Value error, stage 'a': the learning rate of 'fc' is -1"),
    ],
)  # fmt: skip
def test_read_rejects_wrong_files(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 0, "resize_size": 0}, "batch_size, resize_size must be at least 1"),
        ({"workers": -1, "cache_mib": -1}, "workers, cache_mib must be at least 0"),
        ({"on_bad_image": "skip", "check": "sample"}, "on_bad_image='skip' needs check='all'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "it must be at least 0 and below"),
        ({"std": (1.0, 0.0, 1.0)}, "std is"),
        (
            {"train_split": "train[:80"},
            r"train_split: split 'train\[:80': .* write train, train\[:80%",
        ),
        ({"val_split": ""}, "val_split: split '': "),
        ({"random_erasing": 1.1}, "random_erasing is 1.1; a probability lies"),
        ({"random_erasing": math.nan}, "random_erasing is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1"),
        ({"mixup": -0.2}, r"mixup is -0.2; its alpha must be 0 \(off\) or positive"),
        ({"cutmix": math.inf}, "cutmix is inf"),
        ({"cutmix": 1.0, "batch_size": 1}, "cutmix mixes images of a batch; batch_size is 1"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": RECIPE.stages[:1] * 2}, "'head'"),
        (
            {
                "stages": (
                    Stage("head", {"fc": 1.0}, 1, batch_size=8),
                    Stage("all", {"*": 1.0}, 1, schedule_time="continue"),
                )
            },
            "stage 'all' continues the schedule of 'head', but their batch sizes are 32 and 8",
        ),
    ],
    ids=str,
)
def test_recipe_rejects_wrong_values(fields, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(RECIPE, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": "many"}, "batch_size: Input should be a valid integer"),
        ({"augment": "mixup"}, "augment: Input should be 'none', 'crop_flip', 'shift', "),
        ({"balance": "weights"}, "balance: Input should be 'none', 'loss' or 'sampling'"),
        ({"on_bad_image": "ignore"}, "on_bad_image: Input should be 'error' or 'skip'"),
        ({"resize_mode": "crop"}, "resize_mode: Input should be 'short_side' or 'squash'"),
        ({"tta": "crops"}, "tta: Input should be 'none' or 'flip'"),
        ({"stages": (Stage("a", {re.compile("fc"): 1.0}, 1),)}, "patterns are strings"),
        ({"stages": (Stage("a", {"fc": 1.0}, 1, optimizer=optax.identity()),)}, "optimizers jaxft"),
    ],
    ids=["type", "augment", "balance", "bad", "resize", "tta", "pattern", "optimizer"],
)
def test_resolve_rejects_values_that_yaml_cannot_hold(fields, message):
    recipe = object.__new__(Recipe)  # without __post_init__, as a config may
    for field in dataclasses.fields(Recipe):
        object.__setattr__(recipe, field.name, fields.get(field.name, getattr(RECIPE, field.name)))
    with pytest.raises(RecipeError, match=message):
        resolve(recipe)


@pytest.mark.parametrize(
    ("fields", "defaults", "expected"),
    [
        ({}, {}, (224, 256, "short_side")),
        ({}, {"resize_mode": "squash", "resize_size": 224}, (224, 224, "squash")),
        ({"resize_mode": "squash", "image_size": 112}, {}, (112, 128, "squash")),
        ({"resize_mode": "short_side"}, {"resize_mode": "squash"}, (224, 256, "short_side")),
    ],
    ids=str,
)
def test_expecting_fills_in_resizing(fields, defaults, expected):
    recipe = dataclasses.replace(RECIPE, **fields).expecting(Preprocessing(**defaults))
    preprocessing = recipe.preprocessing
    assert (
        preprocessing.image_size,
        preprocessing.resize_size,
        preprocessing.resize_mode,
    ) == expected
    assert recipe.expecting(Preprocessing()) == recipe


def test_differences_ignore_fields_that_do_not_affect_the_result():
    other = dataclasses.replace(RECIPE, batch_size=64, workers=7, cache_mib=0, mixup=0.2)
    assert [*map(str, differences(RECIPE, other))] == ["batch_size: 32 -> 64", "mixup: 0.0 -> 0.2"]
    assert differences(RECIPE, RECIPE) == []


def test_network_has_the_options_of_the_recipe():
    options = {
        "stride_in_1x1": True,
        "concat_pool": True,
        "binary": True,
        "dropout": 0.1,
        "drop_path": 0.2,
        "dtype": "bfloat16",
    }
    recipe = dataclasses.replace(RECIPE, model="resnet50", **options)
    assert recipe.network(2) == models.create("resnet50", num_classes=2, **options)


def test_during_applies_the_overrides_of_a_stage():
    stage = Stage("a", {"*": 1.0}, 1, batch_size=8, augment="none", label_smoothing=0.1, mixup=0.0)
    recipe = dataclasses.replace(RECIPE, mixup=0.2, stages=(stage, *RECIPE.stages))
    during = recipe.during(stage)
    overridden = (during.batch_size, during.augment, during.label_smoothing, during.mixup)
    assert overridden == (8, "none", 0.1, 0.0)
    assert (during.model, during.cutmix) == (recipe.model, recipe.cutmix)
    assert recipe.during(RECIPE.stages[-1]) is recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random_erasing": 2.0}, "stage 'a': random_erasing is 2.0; a probability"),
        ({"batch_size": 0}, "stage 'a': batch_size must be at least 1"),
        ({"batch_size": 1, "mixup": 0.2}, "stage 'a': mixup mixes images of a batch"),
        ({"accumulate": 5}, "stage 'a': a batch of 32 cannot be divided into 5 equal parts"),
        ({"batch_size": 8, "accumulate": 3}, "stage 'a': a batch of 8 cannot"),
    ],
    ids=str,
)
def test_recipe_rejects_stages_that_contradict_it(fields, message):
    stages = (Stage("a", {"*": 1.0}, 1, **fields),)
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(RECIPE, stages=stages)


def test_check_own_network_rejects_options_of_jaxft_networks():
    RECIPE.check_own_network()
    recipe = dataclasses.replace(RECIPE, dropout=0.1, dtype="bfloat16")
    with pytest.raises(RecipeError, match="dropout, dtype shape jaxft's own networks"):
        recipe.check_own_network()


OF_WEIGHTS = Preprocessing(
    image_size=64, resize_size=80, interpolation="bicubic", mean=(0.1,) * 3, std=(0.2,) * 3
)
EXPECTED = {
    "as the weights": ({}, OF_WEIGHTS),
    "another size, in proportion": (
        {"image_size": 32},
        dataclasses.replace(OF_WEIGHTS, image_size=32, resize_size=40),
    ),
    "overridden by the recipe": (
        {"resize_size": 64, "interpolation": "bilinear", "std": (0.5,) * 3},
        dataclasses.replace(OF_WEIGHTS, resize_size=64, interpolation="bilinear", std=(0.5,) * 3),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_expecting_fills_in_the_preprocessing_of_the_weights(fields, expected):
    settled = dataclasses.replace(RECIPE, **fields).expecting(OF_WEIGHTS)
    assert settled.preprocessing == expected
    assert settled.expecting(Preprocessing()) == settled


def test_expecting_without_resize_size_uses_the_image_size():
    defaults = dataclasses.replace(OF_WEIGHTS, resize_size=None)
    settled = RECIPE.expecting(defaults)
    assert (settled.image_size, settled.resize_size) == (64, 64)
    assert settled.expecting(Preprocessing()) == settled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 8, "resize_size": 4}, "resize_size 4 is below image_size 8"),
        ({"weights": None, "head": "keep"}, "keeps the head of the weights"),
        ({"lora_alpha": 8.0}, "lora_alpha scales adapters, but lora has none"),
    ],
)
def test_recipe_rejects_contradictory_fields(fields, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(RECIPE, **fields)
