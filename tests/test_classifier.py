"""`Classifier`: the same logits as in a run's validation, from every source of weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft import (
    Adam,
    Classifier,
    DataError,
    Recipe,
    Stage,
    WeightsError,
    data,
    finetune,
    models,
    weights,
)
from jaxft.evaluation import evaluate
from jaxft.models import Linen

CLASSES = ("ants", "bees", "crabs")


def pixels(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def source(count, seed=0):
    targets = np.arange(count, dtype=np.int32) % len(CLASSES)
    images = pixels(count, seed=seed) // 2 + 40 * targets[:, None, None, None].astype(np.uint8)
    return data.arrays(images, targets, CLASSES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with mirror images in validation, its workdir and its validation images."""
    recipe = Recipe(
        model="cifar_resnet8", data="given", image_size=8, resize_size=8, batch_size=4,
        augment="none", tta="flip", optimizer=Adam(), stages=(Stage("all", {"*": 1e-2}, epochs=2),),
    )  # fmt: skip
    workdir, splits = tmp_path_factory.mktemp("run"), data.Splits(source(12), source(11, seed=1))
    result = finetune(recipe, workdir, data=splits, console=None)
    return workdir, splits.val, result.score


@pytest.mark.parametrize(
    "place", ["", "model.safetensors", "checkpoints", "checkpoints/6", "export"]
)
def test_classifier_reproduces_validation_score(run, place):
    workdir, val, score = run
    if place == "export":  # a copy without checkpoints
        (workdir / place).mkdir(exist_ok=True)
        for name in ("model.safetensors", "model.json"):
            (workdir / place / name).write_bytes((workdir / name).read_bytes())
    classifier = Classifier.load(workdir / place, batch_size=3)
    assert (classifier.classes, classifier.tta) == (CLASSES, "flip")
    found = evaluate(classifier, val)
    assert found.accuracy == score.accuracy
    assert found.loss == pytest.approx(score.loss, rel=1e-6)


def test_predict_files_folders_and_patterns(run, tmp_path):
    classifier = Classifier.load(run[0])
    images = pixels(3)
    (tmp_path / "more").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "more" / "b.png", tmp_path / "c.PNG"]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    expected = classifier.predict(images)
    assert expected.images == (0, 1, 2)
    np.testing.assert_allclose(expected.probabilities.sum(-1), 1, rtol=1e-12)
    best = expected.probabilities.argmax(-1)
    assert expected.labels == [CLASSES[k] for k in best]
    assert [row[0] for row in expected.top(2)] == [row[0] for row in expected.assigned()]

    by_place = classifier.predict([tmp_path / "a.png", tmp_path / "more", f"{tmp_path}/*.PNG"])
    assert by_place.images == tuple(paths)
    np.testing.assert_array_equal(by_place.probabilities, expected.probabilities)
    assert len(classifier.predict(tmp_path)) == 3


def test_predict_lists_unreadable_images(run, tmp_path):
    classifier = Classifier.load(run[0])
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        classifier.predict(tmp_path)
    predictions = classifier.predict(tmp_path, on_bad_image="skip")
    assert predictions.problems == {1: "not an image"}
    assert predictions.labels[1] is None
    assert np.isnan(predictions.probabilities).all(-1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ("nowhere.png", "there is no nowhere.png"),
        ("*.webp", r"no file matches \*.webp"),
        ([], "there are no images to classify"),
    ],
)
def test_predict_without_images(run, places, message):
    with pytest.raises(DataError, match=message):
        Classifier.load(run[0]).predict(places)


def test_features_are_the_inputs_of_the_head(run):
    classifier = Classifier.load(run[0])
    images = pixels(5)
    features = classifier.features(images)
    head = classifier.params["fc"]
    assert features.shape == (5, head["kernel"].shape[0])
    logits = dataclasses.replace(classifier, tta="none").logits(
        data.arrays(images, np.zeros(5, np.int32), CLASSES)
    )
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-4)


def test_classifier_of_weights_without_description(tmp_path):
    model = models.create("cifar_resnet8", num_classes=4)
    weights.save(tmp_path / "described.safetensors", model, *model.init(jax.random.key(0)))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "described.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match="does not state its network: name it with model="):
        Classifier.load(tmp_path / "plain.safetensors")
    classifier = Classifier.load(tmp_path / "plain.safetensors", model="cifar_resnet8")
    assert classifier.classes == ("0", "1", "2", "3")


def test_classifier_of_a_users_module(tmp_path):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    model = Linen(Net(), shape=(8, 8, 3), head="head")
    recipe = Recipe(
        model="net", data="given", image_size=8, resize_size=8, batch_size=4, augment="none",
        stages=(Stage("all", {"*": 1e-2}, epochs=1),),
    )  # fmt: skip
    splits = data.Splits(source(8), source(7, seed=1))
    result = finetune(recipe, tmp_path, data=splits, model=model, console=None)
    with pytest.raises(WeightsError, match=r"no model is called 'net'(.|\n)*Classifier.load"):
        Classifier.load(tmp_path)
    classifier = Classifier.load(tmp_path, model=model, batch_size=4)
    assert evaluate(classifier, splits.val).accuracy == result.score.accuracy
    with pytest.raises(WeightsError, match="single block"):
        classifier.features(pixels(1))


def test_exported_description_states_evaluation(run):
    description = json.loads((run[0] / "model.json").read_text())
    assert (description["tta"], description["matmul_precision"]) == ("flip", "default")
