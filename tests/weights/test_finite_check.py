"""Weights with NaN, infinity or negative running variances are refused and named."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import Recipe, Stage, WeightsError, finetune, models, weights
from jaxft.report.console import Console
from jaxft.weights.locate import locate

MODEL = models.create("cifar_resnet8", num_classes=40)
MODEL_5_9 = models.create("cifar_resnet8", num_classes=5)
TENSORS = load_file(locate("asset:digits_0to4").path)
NAMES = [
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
@pytest.mark.parametrize("name", NAMES)
def test_check_finite_refuses_a_weights_file(name, value, tmp_path):
    corrupted = TENSORS[name].copy()
    corrupted.flat[0] = value
    save_file({**TENSORS, name: corrupted}, tmp_path / "weights.safetensors")
    message = (
        rf"weights\.safetensors holds NaN or infinity.* {name} \(1 of {corrupted.size:,} values"
    )
    with pytest.raises(WeightsError, match=message):
        weights.load(tmp_path / "weights.safetensors", MODEL)


def test_check_finite_refuses_negative_running_variances(tmp_path):
    """In a file and in arrays. 0 is valid: the variance of a dead channel."""
    name, file = "layer2.0.bn1.running_var", tmp_path / "weights.safetensors"
    variance = TENSORS[name].copy()
    variance[:2] = -1e-3, 0
    save_file({**TENSORS, name: variance}, file)
    message = (
        rf"holds running variances below 0.* in {name} \(1 of {variance.size} values\)\. Start"
    )
    with pytest.raises(WeightsError, match=message):
        weights.load(file, MODEL)
    params, stats = MODEL_5_9.init(jax.random.key(0))
    stats["bn1"]["var"] = -stats["bn1"]["var"]
    with pytest.raises(
        WeightsError, match=r"start .* variances below 0.* in 1\.bn1\.var \(16 of 16"
    ):
        finetune(RECIPE, tmp_path / "run", start=(params, stats), console=Console(quiet=True))


def test_check_finite_ignores_a_replaced_head(tmp_path):
    save_file({**TENSORS, "fc.bias": np.full(40, np.inf, np.float32)}, tmp_path / "w.safetensors")
    weights.load(tmp_path / "w.safetensors", MODEL, head="zeros")


def test_check_finite_refuses_start_arrays(tmp_path):
    """The message shows a few names and counts the others, and no folder is created."""
    start = jax.tree.map(lambda x: x * np.nan, MODEL_5_9.init(jax.random.key(0)))
    message = r"start .* in 0\.bn1\.bias .*, and \d+ more tensors\. Start from other weights"
    with pytest.raises(WeightsError, match=message):
        finetune(RECIPE, tmp_path / "run", start=start, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
