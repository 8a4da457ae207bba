"""Saved files have torch's names and layouts, and are written atomically."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.models.networks import resnet_variants
from jaxft.weights import load, save
from jaxft.weights.key_maps import torch_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden

MODEL = create("cifar_resnet8", num_classes=5)


@pytest.fixture(scope="module")
def trees():
    return MODEL.init(jax.random.key(0))


def test_save_uses_names_and_layouts_of_torch(trees, tmp_path):
    params, stats = trees
    expected = {
        "conv1.weight": np.transpose(params["conv1"]["kernel"], (3, 2, 0, 1)),
        "layer2.0.conv1.weight": np.transpose(
            params["layer2"]["0"]["conv1"]["kernel"], (3, 2, 0, 1)
        ),
        "layer3.0.bn2.weight": params["layer3"]["0"]["bn2"]["scale"],
        "layer3.0.bn2.bias": params["layer3"]["0"]["bn2"]["bias"],
        "layer3.0.bn2.running_mean": stats["layer3"]["0"]["bn2"]["mean"],
        "layer3.0.bn2.running_var": stats["layer3"]["0"]["bn2"]["var"],
        "fc.weight": params["fc"]["kernel"].T,
        "fc.bias": params["fc"]["bias"],
    }
    save(tmp_path / "w", MODEL, params, stats)
    with safe_open(tmp_path / "w", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.keys()) == len(jax.tree.leaves(trees))
        for name, array in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_save_that_fails_leaves_the_old_file(trees, tmp_path, monkeypatch):
    path = tmp_path / "w"
    save(path, MODEL, *trees)

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, MODEL, *jax.tree.map(lambda x: x + 1, trees))
    jax.tree.map(np.testing.assert_array_equal, load(path, MODEL), trees)
    assert os.listdir(tmp_path) == ["w"]


def test_save_uses_the_usual_file_permissions(trees, tmp_path):
    (tmp_path / "any").touch()
    save(tmp_path / "w", MODEL, *trees)
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_save_refuses_trees_of_another_network(trees, tmp_path):
    other = create("cifar_resnet8", num_classes=6)
    with pytest.raises(WeightsError, match="cifar_resnet8 with 6 classes"):
        save(tmp_path / "w", other, *trees)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not record_golden.originals_are_here(), reason="needs the torch extra")
@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "resnet26t"])
def test_torchvision_and_timm_load_a_saved_file_strictly(name, tmp_path):
    import torch

    model = create(name, num_classes=record_golden.NUM_CLASSES)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    trees = structure.unflatten([np.full(x.shape, i, np.float32) for i, x in enumerate(leaves)])
    save(tmp_path / "w", model, *trees)
    with torch.device("meta"):
        module = record_golden.torch_network(name)
    with safe_open(tmp_path / "w", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    module.load_state_dict(state, strict=True, assign=True)
    loaded = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    assert {n: tuple(t.shape) for n, t in loaded.items()} == {
        t.name: t.shape for t in jax.tree.leaves(torch_tensors(*abstract))
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", resnet_variants.CONFIGS)
def test_torch_tensors_layouts_are_bit_exact(name):
    """Every ResNet's tensors to torch's layout and back."""
    abstract = jax.eval_shape(create(name).init, jax.random.key(0))
    tensors = jax.tree.leaves(torch_tensors(*abstract))
    arrays = record_golden.weights({t.name: t.shape for t in tensors})
    for tensor, leaf in zip(tensors, jax.tree.leaves(abstract), strict=True):
        array = tensor.from_torch(arrays[tensor.name])
        assert array.shape == leaf.shape
        np.testing.assert_array_equal(tensor.to_torch(array), arrays[tensor.name])
