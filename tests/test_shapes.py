"""Shapes in annotations: they are true of a run, and wrong shapes are errors.

The package does not check its annotations. Here `beartype` checks each call against them.
"""

import subprocess
import sys
from functools import partial, wraps
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import linen as nn
from jaxtyping import TypeCheckError, jaxtyped

import jaxft
from jaxft import Focal, data, linear_probe, losses, models
from jaxft.data import mixup, random_erasing
from jaxft.models.nnx_adapter import NNXModel
from jaxft.models.user_model import UserModel
from jaxft.train.loss import Loss
from jaxft.train.metrics import Metrics

PACKAGE = Path(jaxft.__file__).parent
MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in sorted(PACKAGE.rglob("*.py"))
    if "from jaxtyping import" in file.read_text()
]

# Trains with checked modules, each kind of batch and loss once, and then makes a wrong call.
CHILD = """
import sys
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(sys.argv[2:], "beartype.beartype"):
    import numpy as np
    from flax import linen as nn
    from jaxft import LinearProbe, Recipe, Stage, data, finetune, logistic_regression, models

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x.mean((1, 2)))

images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
source = data.arrays(images, np.arange(12) % 3, classes=["a", "b", "c"])
mixed = {"mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.5, "label_smoothing": 0.1}
runs = {
    "cifar_resnet8": (
        None, [Stage("probe", {"fc": LinearProbe((1.0,))}), Stage("all", {"*": 1e-3}, 1, **mixed)]
    ),
    "linen": (models.Linen(Net(), shape=(8, 8, 3), head="head"), [Stage("all", {"*": 1e-3}, 1)]),
}
for name, (model, stages) in runs.items():
    recipe = Recipe(model=name, data="noise", image_size=8, batch_size=4, stages=stages)
    finetune(recipe, f"{sys.argv[1]}/{name}", data=source, model=model)
try:
    logistic_regression(images[:, 0, 0] / 255, np.arange(3), 3)
except TypeCheckError:
    print("the wrong call is an error")
"""


class Net(nn.Module):
    """A network of a user."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def floats(*shape):
    return jnp.zeros(shape)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def bools(*shape):
    return jnp.ones(shape, bool)


def pixels(*shape):
    return np.zeros(shape, np.uint8)


def network(model):
    shapes = jax.eval_shape(model.init, KEY)
    params, stats = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    inputs = {"inputs": floats(4, 8, 8, 3), "mask": bools(4), "key": KEY}
    return {"self": model, "params": params, "stats": stats, "norms": "running", **inputs}


KEY = jax.random.key(0)
LINEN = models.Linen(Net(), shape=(8, 8, 3), head="head")
RESNET = models.create("cifar_resnet8", num_classes=5)
MIXING = {"key": KEY, "images": floats(4, 8, 8, 3), "targets": floats(4, 5), "mask": bools(4)}

# Functions with right arguments: b = 4, h = w = 8, c = 3, k = 5.
CALLS = {
    "apply resnet": (NNXModel.apply, network(RESNET)),
    "apply linen": (UserModel.apply, network(LINEN)),
    "init": (NNXModel.init, {"self": RESNET, "key": KEY}),
    "batch": (
        data.Batch.__new__,
        {"_cls": data.Batch, "image": pixels(4, 8, 8, 3), "target": ints(4), "mask": bools(4)},
    ),
    "normalize": (
        data.Preprocessing.normalize,
        {"self": data.Preprocessing(), "images": pixels(4, 8, 8, 3)},
    ),
    "erasing_boxes": (
        random_erasing.erasing_boxes,
        {"key": KEY, "count": 4, "height": 8, "width": 8},
    ),
    "erase": (random_erasing.erase, {"images": floats(4, 8, 8, 3), "boxes": ints(4, 4)}),
    "soft_targets": (mixup.soft_targets, {"target": ints(4), "num_classes": 5}),
    "mixup": (mixup.mixup, {**MIXING, "alpha": 0.2}),
    "cutmix": (mixup.cutmix, {**MIXING, "alpha": 1.0}),
    "mixup_or_cutmix": (
        mixup.mixup_or_cutmix,
        {**MIXING, "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    ),
    "erase_and_mix": (
        Loss.erase_and_mix,
        {
            "self": Loss(label_smoothing=0.1, random_erasing=0.5),
            "images": floats(4, 8, 8, 3),
            "target": ints(4),
            "mask": bools(4),
            "num_classes": 5,
            "key": KEY,
        },
    ),
    "erase_and_mix labels": (
        Loss.erase_and_mix,
        {
            "self": Loss(function="bce", multi_label=True, mixup=0.2),
            "images": floats(4, 8, 8, 3),
            "target": ints(4, 5),
            "mask": bools(4),
            "num_classes": 5,
            "key": KEY,
        },
    ),
    "losses": (Loss.losses, {"self": Loss(), "logits": floats(4, 5), "targets": ints(4)}),
    "losses soft": (Loss.losses, {"self": Loss(), "logits": floats(4, 5), "targets": floats(4, 5)}),
    "losses bce": (
        Loss.losses,
        {"self": Loss(function="bce"), "logits": floats(4, 5), "targets": floats(4, 5)},
    ),
    "example_losses": (
        losses.example_losses,
        {"loss": Focal(), "logits": floats(4, 5), "targets": ints(4)},
    ),
    "weights": (Loss.weights, {"self": Loss(), "targets": floats(4, 5)}),
    "metrics": (
        Metrics.of_batch.__func__,
        {"cls": Metrics, "logits": floats(4, 5), "targets": ints(4), "mask": bools(4)},
    ),
    "metrics labels": (
        Metrics.of_batch.__func__,
        {"cls": Metrics, "logits": floats(4, 5), "targets": ints(4, 5), "mask": bools(4)},
    ),
    "metrics of a user": (
        Metrics.of_batch.__func__,
        {
            "cls": Metrics,
            "logits": floats(4, 5),
            "targets": ints(4),
            "mask": bools(4),
            "loss": "bce",
            "metrics": ("optax:softmax_cross_entropy",),
        },
    ),
    "logistic_regression": (
        linear_probe.logistic_regression,
        {"features": np.eye(4), "targets": np.arange(4) % 2, "num_classes": 2},
    ),
}

# Functions with an argument that does not fit the others.
WRONG = [
    ("apply resnet", "inputs", ints(4, 8, 8, 3)),
    ("apply resnet", "mask", bools(3)),
    ("apply resnet", "mask", floats(4)),
    ("apply resnet", "key", floats(2)),
    ("apply resnet", "norms", "eval"),
    ("apply linen", "inputs", floats(4, 8, 8)),
    ("apply linen", "mask", bools(4, 1)),
    ("init", "key", 0),
    ("batch", "image", pixels(4, 3, 8, 8)),
    ("batch", "image", ints(4, 8, 8, 3)),
    ("batch", "target", floats(4)),
    ("batch", "mask", bools(3)),
    ("normalize", "images", pixels(8, 8, 3)),
    ("normalize", "images", ints(4, 8, 8, 3)),
    ("normalize", "images", floats(4, 8, 8, 1)),
    ("erasing_boxes", "key", ints(2)),
    ("erase", "images", floats(8, 8, 3)),
    ("erase", "boxes", ints(3, 4)),
    ("soft_targets", "target", floats(4)),
    ("mixup", "targets", floats(3, 5)),
    ("mixup", "mask", ints(4)),
    ("cutmix", "images", floats(4, 8, 8)),
    ("mixup_or_cutmix", "targets", ints(4)),
    ("erase_and_mix", "images", floats()),
    ("erase_and_mix", "target", ints(4, 1)),
    ("erase_and_mix", "mask", bools(3)),
    ("erase_and_mix labels", "target", ints(4, 6)),
    ("metrics labels", "targets", ints(4, 6)),
    ("losses", "logits", floats(4)),
    ("losses", "targets", ints(3)),
    ("losses soft", "targets", floats(4, 6)),
    ("losses bce", "targets", floats(4)),
    ("example_losses", "logits", floats(4, 5, 1)),
    ("example_losses", "targets", ints(4, 5)),
    ("weights", "targets", floats(4)),
    ("metrics", "logits", ints(4, 5)),
    ("metrics", "targets", floats(4, 5)),
    ("metrics", "mask", ints(4)),
    ("logistic_regression", "features", np.zeros(4)),
    ("logistic_regression", "targets", np.zeros(3, int)),
    ("logistic_regression", "targets", np.zeros(4)),
]


def checked(function):
    return jaxtyped(function, typechecker=beartype)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_of_right_arguments(name):
    """The result is checked too."""
    function, arguments = CALLS[name]
    call = partial(checked(function), **arguments)
    call() if function is linear_probe.logistic_regression else jax.eval_shape(call)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    WRONG,
    ids=lambda x: x if isinstance(x, str) else str(np.shape(x)),
)
def test_shapes_of_wrong_arguments(name, argument, value):
    function, arguments = CALLS[name]
    assert argument in arguments
    with pytest.raises(TypeCheckError, match=f"parameter '{argument}'"):
        checked(function)(**{**arguments, argument: value})


def test_shapes_of_a_wrong_result():
    """A shape in braces is computed from the arguments."""
    _, arguments = CALLS["soft_targets"]

    @wraps(mixup.soft_targets)
    def wrong(target, num_classes, smoothing=0.0):
        return mixup.soft_targets(target, num_classes + 1, smoothing)

    with pytest.raises(TypeCheckError, match="return value"):
        jax.eval_shape(partial(checked(wrong), **arguments))


FEATURES = np.zeros((6, 2, 2, 4), np.float32)


@pytest.mark.parametrize("values", ["uint8", "normalized"])
@pytest.mark.parametrize("features", [None, FEATURES])
def test_shapes_of_batches(values, features):
    images = pixels(6, 8, 8, 3)
    images = images if values == "uint8" else images.astype(np.float32)
    source = data.arrays(images, np.arange(6) % 2, ["a", "b"], values=values)
    preprocessing = data.Preprocessing(image_size=8, resize_size=None)
    config = data.BatchConfig(
        preprocessing=preprocessing, augment="none", batch_size=4, seed=0, stage=0
    )
    options = {"workers": 0, "features": None if features is None else lambda view: features}
    batches = [
        *checked(data.train_batches)(source, config, epochs=1, **options),
        *checked(data.eval_batches)(
            source, preprocessing, batch_size=4, workers=0, features=features
        ),
    ]
    assert len(batches) == 4
    for batch in [*batches, jax.device_put(batches[0])]:
        checked(data.Batch.__new__)(data.Batch, *batch)


def test_protocols_can_be_checked():
    """A type checker at run time needs `isinstance`."""
    source = data.arrays(pixels(1, 8, 8, 3), np.zeros(1, int), ["a"])
    assert isinstance(source, data.Source)
    assert not isinstance(RESNET, data.Source)
    assert isinstance(RESNET, models.Model)
    assert isinstance(LINEN, models.Model)
    assert not isinstance(source, models.Model)


@pytest.mark.slow
def test_shapes_are_true_of_a_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), *MODULES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the wrong call is an error\n")
