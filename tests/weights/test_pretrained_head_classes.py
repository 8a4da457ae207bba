"""Class names are stored with a head, and the outputs of a loaded head match the images."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import WeightsError
from jaxft.models import Linen, create
from jaxft.weights import load, read, save

MODEL = create("cifar_resnet8", num_classes=3)
NAMES = ["ant", "bee", "caf\u00e9"]
REORDERED = ["cafe\u0301", "ant", "bee"]  # the accent is a combining character


def trees(model):
    params, stats = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.25, params), stats


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classes") / "model.safetensors"
    save(path, MODEL, *trees(MODEL), classes=NAMES)
    return path


def test_classes_are_in_the_metadata_of_a_file(file, tmp_path):
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    assert read(alone).network.classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.json", {"model": "cifar_resnet8", "classes": NAMES}),
        ("config.json", {"pretrained_cfg": {"label_names": NAMES}}),
        ("config.json", {"label_names": {"0": "ant", "1": "bee", "2": NAMES[2]}}),
        ("config.json", {"id2label": {"1": "bee", "0": "ant", "2": NAMES[2]}}),
    ],
    ids=["model.json", "timm", "timm by index", "transformers"],
)
def test_classes_from_a_json_file_next_to_the_weights(name, content, file, tmp_path):
    save_file(load_file(file), tmp_path / "w.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    assert read(tmp_path / "w.safetensors").network.classes == tuple(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}},
        {"id2label": {"0": "ant", "7": "bee"}},
        {"id2label": {"ant": 0}},
        {"classes": "ant"},
        {"classes": [1, 2, 3]},
        {"label_names": []},
    ],
    ids=str,
)
def test_unknown_classes_are_not_checked(content, file, tmp_path):
    save_file(load_file(file), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read(tmp_path / "w.safetensors").network.classes is None
    load(tmp_path / "w.safetensors", MODEL, classes=["x", "y", "z"])


def test_class_order_compares_names_in_nfc(file):
    params, _ = load(file, MODEL, classes=["ant", "bee", REORDERED[0]])
    np.testing.assert_array_equal(params["fc"]["bias"], trees(MODEL)[0]["fc"]["bias"])


HEADS = {
    "one layer": MODEL,
    "layers": create("cifar_resnet8", num_classes=3, head_layers=(5, "relu")),
    "fastai": create("cifar_resnet8", num_classes=3, concat_pool=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", HEADS.values(), ids=HEADS)
def test_reordered_head_outputs_follow_the_class_names(model, tmp_path):
    before = trees(model)
    save(tmp_path / "w", model, *before, classes=NAMES)
    with pytest.warns(
        UserWarning, match=r"another order \(ant, bee, café\).*match the images \(cafe"
    ) as issued:
        after = load(tmp_path / "w", model, classes=REORDERED)
    assert len(issued) == 1
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    old, new = (model.apply(*x, images, norms="running")[0] for x in (before, after))
    np.testing.assert_array_equal(new, np.asarray(old)[:, [2, 0, 1]])


@pytest.mark.slow
def test_reordered_binary_head_is_negated(tmp_path):
    model = create("cifar_resnet8", num_classes=2, binary=True)
    before = trees(model)
    save(tmp_path / "w", model, *before, classes=["no", "yes"])
    with pytest.warns(UserWarning, match="another order"):
        after = load(tmp_path / "w", model, classes=["yes", "no"])
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    old, new = (model.apply(*x, images, norms="running")[0] for x in (before, after))
    np.testing.assert_array_equal(new[:, 1], -np.asarray(old)[:, 1])


def test_reordered_head_of_a_user_module(tmp_path):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(x.mean((1, 2)))

    model = Linen(Net(), shape=(4, 4, 3), head="out")
    params, stats = model.init(jax.random.key(0))
    save(tmp_path / "w", model, params, stats, classes=NAMES)
    with pytest.warns(UserWarning, match="another order"):
        loaded, _ = load(tmp_path / "w", model, classes=REORDERED)
    np.testing.assert_array_equal(loaded["out"]["kernel"], params["out"]["kernel"][:, [2, 0, 1]])


def test_class_order_refuses_other_classes(file):
    with pytest.raises(WeightsError) as raised:
        load(file, MODEL, classes=["bee", "café", "wasp"])
    assert str(raised.value).splitlines() == [
        f"{file} has a head for other classes than the images.",
        "  the head's (3): ant, bee, café",
        "  the images' (3): bee, café, wasp",
        "head='fresh' starts a new head.",
        "head_classes='ignore' uses its outputs for these classes, in this order.",
    ]
    load(file, MODEL, classes=["bee", "café", "wasp"], head="fresh")
    load(file, MODEL)


def test_class_order_refuses_another_number_of_classes(file):
    with pytest.raises(WeightsError, match=r"the images' \(4\): ant, bee, café, dog") as raised:
        load(file, create("cifar_resnet8", num_classes=4), classes=[*NAMES, "dog"])
    assert "ignore" not in str(raised.value)


def test_class_order_shows_differences_of_long_lists(tmp_path):
    model = create("cifar_resnet8", num_classes=100)
    names = [f"class{i:02}" for i in range(100)]
    save(tmp_path / "w", model, *model.init(jax.random.key(0)), classes=names)
    with pytest.raises(WeightsError) as raised:
        load(tmp_path / "w", model, classes=[*names[:-1], "wasp"])
    assert str(raised.value).splitlines()[1:4] == [
        "  only the head's: class99",
        "  only the images': wasp",
        "  both have 99 of 100 and 100",
    ]
