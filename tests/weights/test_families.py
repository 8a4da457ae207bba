"""Other libraries' names: their recorded networks, loaded into ours, compute what they did."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.weights import load, read
from jaxft.weights.families import renamed

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden


def transformers(name):
    """The recorded names and shapes, and the logits."""
    with np.load(record_golden.GOLDEN / f"transformers_{name}.npz") as golden:
        shapes = [tuple(map(int, shape.split())) for shape in golden["shapes"].tolist()]
        return dict(zip(golden["names"].tolist(), shapes, strict=True)), golden["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers(name, tmp_path):
    shapes, logits = transformers(name)
    counters = {"resnet.embedder.embedder.normalization.num_batches_tracked": np.array(7)}
    save_file(record_golden.weights(shapes) | counters, tmp_path / "w")
    model = create(name, num_classes=record_golden.NUM_CLASSES)
    params, stats = load(tmp_path / "w", model)
    images = jnp.asarray(record_golden.images(65).transpose(0, 2, 3, 1))
    ours, _ = model.apply(params, stats, images, norms="running")
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_a_body_without_its_head(tmp_path):
    """`ResNetModel` of transformers: no classifier, no `resnet.` before its names."""
    shapes, _ = transformers("resnet18")
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


def test_torchvisions_names_are_their_own():
    for name in ("resnet50", "resnet50d", "cifar_resnet20"):
        params, stats = jax.eval_shape(create(name).init, jax.random.key(0))
        flat, _ = jax.tree_util.tree_flatten_with_path((params, stats))
        names = [jax.tree_util.keystr(p[1:], simple=True, separator=".") for p, _ in flat]
        assert all(renamed([n], "x") == {n: n} for n in names)


def test_a_name_that_nobody_has_stays_for_the_report(tmp_path):
    shapes, _ = transformers("resnet18")
    arrays = record_golden.weights(shapes)
    arrays["resnet.encoder.stages.0.layers.0.squeeze.weight"] = np.ones(3, np.float32)
    save_file(arrays, tmp_path / "w")
    refused = partial(load, tmp_path / "w", create("resnet18", num_classes=10))
    with pytest.raises(WeightsError, match=r"not in the network \(1\):\n.*layers\.0\.squeeze"):
        refused()
