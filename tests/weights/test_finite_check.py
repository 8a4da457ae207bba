"""Weights with NaN or infinity are refused, wherever they come from, and named."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import Recipe, Stage, WeightsError, finetune, models, weights
from jaxft.report.console import Console
from jaxft.weights.locate import locate

MODEL = models.create("cifar_resnet8", num_classes=40)
FIVE = models.create("cifar_resnet8", num_classes=5)
TENSORS = load_file(locate("asset:digits_0to4").path)
PLACES = [
    *("conv1.weight", "bn1.running_mean", "bn1.running_var"),
    *("layer2.0.conv1.weight", "layer2.0.bn1.running_mean", "layer2.0.bn1.running_var"),
    *("fc.weight", "fc.bias"),
]

RECIPE = Recipe(
    model="cifar_resnet8",
    data="digits:5-9",
    image_size=8,
    resize_size=8,
    stages=(Stage("head", {"fc": 1e-2}, epochs=1),),
)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PLACES)
def test_weights_file_that_is_not_finite_is_refused(name, value, tmp_path):
    poisoned = TENSORS[name].copy()
    poisoned.flat[0] = value
    save_file({**TENSORS, name: poisoned}, tmp_path / "weights.safetensors")
    told = rf"weights\.safetensors holds NaN or infinity.* {name} \(1 of {poisoned.size:,} values"
    with pytest.raises(WeightsError, match=told):
        weights.load(tmp_path / "weights.safetensors", MODEL)


def test_negative_running_variance_is_refused(tmp_path):
    """In a file and in arrays; 0 is a variance, of a channel that is dead."""
    name, file = "layer2.0.bn1.running_var", tmp_path / "weights.safetensors"
    variance = TENSORS[name].copy()
    variance[:2] = -1e-3, 0
    save_file({**TENSORS, name: variance}, file)
    told = rf"holds running variances below 0.* in {name} \(1 of {variance.size} values\)\. Start"
    with pytest.raises(WeightsError, match=told):
        weights.load(file, MODEL)
    params, stats = FIVE.init(jax.random.key(0))
    stats["bn1"]["var"] = -stats["bn1"]["var"]
    with pytest.raises(
        WeightsError, match=r"start .* variances below 0.* in 1\.bn1\.var \(16 of 16"
    ):
        finetune(RECIPE, tmp_path / "run", start=(params, stats), console=Console(quiet=True))


def test_infinite_head_that_is_replaced_does_not_matter(tmp_path):
    save_file({**TENSORS, "fc.bias": np.full(40, np.inf, np.float32)}, tmp_path / "w.safetensors")
    weights.load(tmp_path / "w.safetensors", MODEL, head="zeros")


def test_start_that_is_not_finite_is_refused(tmp_path):
    """The message shows a few names and counts the others; no folder is left."""
    start = jax.tree.map(lambda x: x * np.nan, FIVE.init(jax.random.key(0)))
    told = r"start .* in 0\.bn1\.bias .*, and \d+ more tensors\. Start from other weights"
    with pytest.raises(WeightsError, match=told):
        finetune(RECIPE, tmp_path / "run", start=start, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
