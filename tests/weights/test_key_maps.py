"""Tensors: torch's layouts, and the names of other libraries."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.weights import load, read
from jaxft.weights.key_maps import torch_tensors, torchvision_names

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (3, 2)])
def test_to_torch_and_from_torch_are_inverse(shape):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    tensor = torch_tensors({"conv": {"kernel": kernel}}, {})[0]["conv"]["kernel"]
    transposed = tensor.to_torch(kernel)
    assert transposed.shape == tensor.shape
    assert transposed.flags.c_contiguous
    np.testing.assert_array_equal(tensor.from_torch(transposed), kernel)


@pytest.mark.parametrize(("leaf", "rank"), [("kernel", 3), ("embedding", 2), ("mean", 2)])
def test_torch_tensors_refuse_unknown_leaves(leaf, rank):
    with pytest.raises(WeightsError, match=f"neck.{leaf} .* no counterpart"):
        torch_tensors({"neck": {leaf: np.ones((1,) * rank)}}, {})


def recorded_transformers(name):
    """Returns the recorded shapes by name, and the logits."""
    with np.load(record_golden.GOLDEN / f"transformers_{name}.npz") as golden:
        shapes = [tuple(map(int, shape.split())) for shape in golden["shapes"].tolist()]
        return dict(zip(golden["names"].tolist(), shapes, strict=True)), golden["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_weights_give_the_recorded_logits(name, tmp_path):
    shapes, logits = recorded_transformers(name)
    counters = {"resnet.embedder.embedder.normalization.num_batches_tracked": np.array(7)}
    save_file(record_golden.weights(shapes) | counters, tmp_path / "w")
    model = create(name, num_classes=record_golden.NUM_CLASSES)
    params, stats = load(tmp_path / "w", model)
    images = jnp.asarray(record_golden.images(65).transpose(0, 2, 3, 1))
    actual, _ = model.apply(params, stats, images, norms="running")
    np.testing.assert_allclose(actual, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_transformers_body_without_head(tmp_path):
    """`ResNetModel` has no classifier, and its names have no `resnet.` prefix."""
    shapes, _ = recorded_transformers("resnet18")
    body = {
        name.removeprefix("resnet."): array
        for name, array in record_golden.weights(shapes).items()
        if name.startswith("resnet.")
    }
    save_file(body, tmp_path / "w")
    model = create("resnet18", num_classes=3)
    params, _ = load(tmp_path / "w", model, head="fresh")
    conv = body["encoder.stages.3.layers.1.layer.1.convolution.weight"]
    np.testing.assert_array_equal(
        params["layer4"]["1"]["conv2"]["kernel"], conv.transpose(2, 3, 1, 0)
    )
    assert read(tmp_path / "w").num_classes is None


def test_torchvision_names_keep_torchvision_and_timm_names():
    for name in ("resnet50", "resnet50d", "cifar_resnet20"):
        params, stats = jax.eval_shape(create(name).init, jax.random.key(0))
        leaves, _ = jax.tree_util.tree_flatten_with_path((params, stats))
        paths = [jax.tree_util.keystr(p[1:], simple=True, separator=".") for p, _ in leaves]
        assert all(torchvision_names([p], "x") == {p: p} for p in paths)


def test_torchvision_names_keep_unknown_names_for_the_report(tmp_path):
    shapes, _ = recorded_transformers("resnet18")
    arrays = record_golden.weights(shapes)
    arrays["resnet.encoder.stages.0.layers.0.squeeze.weight"] = np.ones(3, np.float32)
    save_file(arrays, tmp_path / "w")
    model = create("resnet18", num_classes=10)
    with pytest.raises(WeightsError, match=r"not in the network \(1\):\n.*layers\.0\.squeeze"):
        load(tmp_path / "w", model)
