"""Recipes that need one class per image, on images that may have several labels."""

import numpy as np
import pytest

from jaxft import (
    EarlyStop,
    Focal,
    LinearProbe,
    Recipe,
    RecipeError,
    Stage,
    data,
    finetune,
    lr_finder,
)
from jaxft.multi_label_check import check_multi_label

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]] * 4)
SOURCE = data.arrays(IMAGES, LABELS, ["a", "b", "c"])


def recipe(*stages, **fields):
    stages = stages or (Stage("all", {"*": 0.1}, 1),)
    return Recipe(model="cifar_resnet8", data="x", image_size=8, stages=stages, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "bce"},
        {"loss": Focal()},
        {"loss": "optax:softmax_cross_entropy"},
        {"loss": "bce", "mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.5, "tta": "flip"},
        {"loss": "bce", "train_split": "train[:80%]", "val_split": "train[80%:]"},
    ],
)
def test_multi_label_check_accepts(fields):
    check_multi_label(recipe(**fields), SOURCE)
    stage = Stage("all", {"*": 0.1}, 9, until=EarlyStop("loss"), loss=fields["loss"])
    check_multi_label(recipe(stage), SOURCE)


@pytest.mark.parametrize(
    ("stage", "fields", "line"),
    [
        ({}, {"loss": "cross_entropy"}, "loss='cross_entropy': set loss='bce', Focal(...), or"),
        ({"loss": "cross_entropy"}, {}, "stage 'all': loss='cross_entropy': set loss='bce'"),
        ({}, {"balance": "loss"}, "balance='loss': leave it out"),
        ({"balance": "sampling"}, {}, "stage 'all': balance='sampling': leave it out"),
        ({}, {"label_smoothing": 0.1}, "label_smoothing=0.1: set it to 0"),
        ({"label_smoothing": 0.1}, {}, "stage 'all': label_smoothing=0.1: set it to 0"),
        ({"class_weights": (1.0, 2.0, 3.0)}, {}, "stage 'all': class_weights: leave them out"),
        ({"monitor": "top5"}, {}, "stage 'all': monitor='top5': monitor 'accuracy', 'loss'"),
        ({}, {"shots": 3}, "shots=3: select by position, such as train_split='train[:100]'"),
        ({}, {"train_split": "train[3/class]"}, "train_split='train[3/class]': select by posi"),
        ({}, {"val_split": "train[80%:/class]"}, "val_split='train[80%:/class]': select by p"),
        ({}, {"loss": "optax:sigmoid_binary_cross_entropy", "binary": True}, "binary=True has"),
    ],
)
def test_multi_label_check_names_a_field(stage, fields, line):
    wrong = recipe(Stage("all", {"*": 0.1}, 1, **stage), **{"loss": "bce", **fields})
    with pytest.raises(RecipeError) as error:
        check_multi_label(wrong, SOURCE)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("targets of shape [12, 3] may give an image several labels, and these")
    assert len(lines) == 1
    assert lines[0].startswith(f"  {line}")


def test_multi_label_check_gathers_everything_before_any_work(tmp_path):
    stages = (
        Stage("probe", {"fc": LinearProbe()}),
        Stage("a", {"*": 0.1}, 9, until=EarlyStop("top5")),
        Stage("b", {"*": 0.1}, 1, class_weights=(1.0, 1.0, 1.0)),
    )
    wrong = recipe(*stages, shots=2, balance="loss", label_smoothing=0.1)
    one_hot = data.arrays(IMAGES, np.eye(3, dtype=int)[np.arange(12) % 3], ["a", "b", "c"])
    with pytest.raises(RecipeError) as error:
        finetune(wrong, tmp_path / "run", data=one_hot)
    assert [line.partition(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "shots=2", "loss='cross_entropy'", "balance='loss'", "label_smoothing=0.1", "stage 'probe'",
        "stage 'a'", "stage 'b'", "Each image has exactly one label",
    ]  # fmt: skip
    assert "targets.argmax(1) makes it the class" in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="loss='cross_entropy': set loss='bce'"):
        lr_finder.trial(recipe(), recipe().stages[0], data=data.Splits(SOURCE, SOURCE))
