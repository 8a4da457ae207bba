"""Losses of single examples: recorded values of torch, closed forms, and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import Focal, Recipe, RecipeError, Stage, losses

LOGITS = np.array([[2, -1, 0.5], [0.1, 0.2, 0.3], [-3, 4, 1], [1.5, 1.5, -2]], np.float32)
CLASSES = np.array([0, 2, 1, 2], np.int32)
TARGETS = {
    "hard": np.eye(3, dtype=np.float32)[CLASSES],
    "soft": np.array([[0.7, 0, 0.3], [0.3, 0.7, 0], [0, 0.3, 0.7], [1, 0, 0]], np.float32),
}
RECORDED = [  # means in float64 of torch 2.13.0's BCEWithLogitsLoss, and of torchvision 0.28.0's
    # sigmoid_focal_loss(alpha=..., gamma=..., reduction="mean"), where alpha=-1 is None
    ("bce", "hard", 0.8684092490025931),
    ("bce", "soft", 0.8000759164515707),
    (Focal(), "hard", 0.4646101762352366),
    (Focal(), "soft", 0.29822661502748027),
    (Focal(2.0, 0.25), "hard", 0.27544592855054073),
    (Focal(2.0, 0.25), "soft", 0.19109715608626657),
    (Focal(0.5), "hard", 0.7230375496840923),
    (Focal(0.5), "soft", 0.6026194423285),
    (Focal(0.0, 0.9), "hard", 0.27526500419354205),
    (Focal(0.0, 0.9), "soft", 0.2738229481105872),
]


def hinge(logits, targets):
    return jnp.maximum(0, 1 - (2 * targets - 1) * logits).mean(-1)


def scalar(logits, targets):
    return hinge(logits, targets).mean()


def by_class(logits, targets):
    return logits * targets


def by_column(logits, targets):
    return (logits * targets).sum(0)


def nothing(logits, targets):
    return None


def hits(logits, targets):
    return logits.argmax(-1) == targets.argmax(-1)


def of_numpy(logits, targets):
    return np.log(logits).sum(-1)


def of_one(logits):
    return logits.sum(-1)


def without_gradient(logits, targets):
    shape = jax.ShapeDtypeStruct(logits.shape[:1], logits.dtype)
    return jax.pure_callback(lambda x: x.sum(-1), shape, logits)


@pytest.mark.parametrize(("loss", "kind", "expected"), RECORDED, ids=str)
def test_loss_is_torchs(loss, kind, expected):
    found = losses.example_losses(loss, jnp.asarray(LOGITS), jnp.asarray(TARGETS[kind]))
    np.testing.assert_allclose(found.mean(), expected, rtol=2e-6)


@pytest.mark.parametrize("loss", ["bce", Focal(1.5, 0.3), "test_losses:hinge", "cross_entropy"])
def test_loss_of_classes_is_loss_of_their_one_hot_rows(loss):
    logits = jnp.asarray(LOGITS)
    of_classes = losses.example_losses(loss, logits, jnp.asarray(CLASSES))
    of_rows = losses.example_losses(loss, logits, jnp.asarray(TARGETS["hard"]))
    assert of_classes.shape == of_rows.shape == (4,)
    np.testing.assert_allclose(of_classes, of_rows, rtol=3e-6)


def test_bce_of_each_example_by_hand():
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    t = TARGETS["soft"].astype(np.float64)
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(1)
    found = losses.example_losses("bce", jnp.asarray(LOGITS), jnp.asarray(TARGETS["soft"]))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_focal_loss_with_gamma_0_is_bce(kind):
    arrays = jnp.asarray(LOGITS), jnp.asarray(TARGETS[kind])
    focal, bce = (losses.example_losses(loss, *arrays) for loss in (Focal(0.0), "bce"))
    np.testing.assert_array_equal(focal, bce)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_of_extreme_logits_is_finite(gamma):
    """1 - p_t rounds to 0, where a power below 1 has no gradient."""
    logits = jnp.array([[200.0, -200.0], [-200.0, 200.0], [200.0, 0.0]])
    targets = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    value = lambda x: Focal(gamma).losses(x, targets).sum()  # noqa: E731
    found, gradient = jax.value_and_grad(value)(logits)
    assert jnp.isfinite(found)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("loss", ["bce", Focal(2.0, 0.25), Focal(0.5)], ids=str)
def test_gradient_is_torchs(loss):
    torch = pytest.importorskip("torch")
    x = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(TARGETS["soft"], dtype=torch.float64)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    if loss != "bce":
        p = torch.sigmoid(x)
        bce = bce * (1 - p * t - (1 - p) * (1 - t)) ** loss.gamma
        alpha = loss.alpha
        bce = bce if alpha is None else bce * (alpha * t + (1 - alpha) * (1 - t))
    bce.mean().backward()
    mean = lambda x: losses.example_losses(loss, x, jnp.asarray(TARGETS["soft"])).mean()  # noqa: E731
    gradient = jax.grad(mean)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma": -1.0}, "Focal: gamma is -1.0; it must be at least 0 and finite."),
        ({"gamma": math.inf}, "gamma is inf"),
        ({"alpha": 1.5, "gamma": math.nan}, "gamma is nan; .*; alpha is 1.5; it must be from 0"),
        ({"gama": 1.0}, "Focal has no field 'gama': did you mean 'gamma'?"),
        ({"gamma": "2"}, "gamma is '2'; it must be a number"),
        ({"reduction": "mean"}, "no field 'reduction': it is a field of the recipe"),
    ],
)
def test_focal_rejects_wrong_values(fields, message):
    with pytest.raises(RecipeError, match=message):
        Focal(**fields)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("ce", r"loss is 'ce'; it must be cross_entropy, bce, Focal\(...\), or MODULE:FUNCTION"),
        ("test_losses:missing", "loss is 'test_losses:missing', and .*py has no 'missing'"),
        ("no_such:loss", "loss is 'no_such:loss', and there is no module 'no_such'"),
        ("test_losses:", "loss is 'test_losses:': it is written MODULE:FUNCTION"),
        ("test_losses:LOGITS", "which is not a function but of type ndarray"),
        (hinge, "loss is <function hin.*, which names a function of yours, because a run saves"),
        (3, "loss is 3; it must be cross_entropy, bce, Focal"),
    ],
)
def test_recipe_rejects_wrong_loss(loss, message):
    stages = (Stage("all", {"*": 0.1}, 1),)
    with pytest.raises(RecipeError, match=message):
        Recipe(model="cifar_resnet8", data="digits", stages=stages, loss=loss)
    stages = (Stage("all", {"*": 0.1}, 1, loss=loss),)
    with pytest.raises(RecipeError, match=f"stage 'all': .*{message}"):
        Recipe(model="cifar_resnet8", data="digits", stages=stages)


@pytest.mark.parametrize("loss", ["bce", Focal()], ids=str)
def test_recipe_rejects_sigmoid_losses_of_a_single_logit(loss):
    stages = (Stage("all", {"*": 0.1}, 1),)
    with pytest.raises(RecipeError, match="has a sigmoid for each of two classes, and binary has"):
        Recipe(model="cifar_resnet8", data="digits:3-4", stages=stages, loss=loss, binary=True)


def test_recipe_accepts_own_loss_of_a_single_logit():
    """It receives the logits [0 z]."""
    stages = (Stage("all", {"*": 0.1}, 1, loss="test_losses:hinge"),)
    Recipe(model="cifar_resnet8", data="digits:3-4", stages=stages, binary=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar", r"which returns shape \[\] for logits and targets of shape \[6, 5\]; it must "
         r"return one value per example, shape \[6\]\."),
        ("by_class", r"which returns shape \[6, 5\] for"),
        ("by_column", r"which returns shape \[5\] for .*, shape \[6\]\."),
        ("nothing", "which returns a NoneType for .* it must return one value"),
        ("hits", "which returns bool; it must return floats"),
        ("of_numpy", r"and calling it fails: TracerArrayConversionError: [^\n]*test_losses.py:\d+"),
        ("of_one", "and calling it fails: TypeError: of_one.. takes 1 positional argument but 2"),
        ("without_gradient", "which has no gradient: ValueError: Pure callbacks do not support"),
    ],
)  # fmt: skip
def test_check_output_names_function_and_shapes(name, message):
    with pytest.raises(RecipeError, match=f"loss is 'test_losses:{name}', {message}"):
        losses.check_output(f"test_losses:{name}", 5)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", Focal(), "test_losses:hinge"], ids=str)
def test_check_output_accepts_right_losses(loss):
    losses.check(loss)
    losses.check_output(loss, 5)
