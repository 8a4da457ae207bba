"""Weights files of users' modules keep their paths and layouts."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.flax import save_file

from jaxft.checkpoint.weights_only import save_weights
from jaxft.errors import WeightsError
from jaxft.models import NNX, Linen
from jaxft.weights import load, save

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from user_modules import Attention, BFloat16, Compact, ModeFlag, Nested

SHAPE = (6, 6, 3)
MODELS = {
    # In another file, its layer `linear` would be renamed to `fc`.
    "attention": Linen(Attention(), shape=SHAPE, head="head"),
    "nested": Linen(Nested(), shape=SHAPE, head="out"),
    "bfloat16": Linen(BFloat16(), shape=SHAPE, head="head"),
    "nnx": NNX(ModeFlag, shape=SHAPE, head="head.out"),
}
KEY = jax.random.key(3)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_user_module_is_restored_bit_for_bit(name, tmp_path):
    model = MODELS[name]
    trees = jax.tree.map(lambda x: x + jnp.asarray(0.5, x.dtype), model.init(KEY))
    save(tmp_path / "own.safetensors", model, *trees)
    assert_identical(load(tmp_path / "own.safetensors", model), trees)
    save_weights(tmp_path / "checkpoint", *trees)
    assert_identical(load(tmp_path / "checkpoint", model), trees)
    with safe_open(tmp_path / "own.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "flax"
        leaves = {**flatten_dict(trees[0], sep="."), **flatten_dict(trees[1], sep=".")}
        assert {*file.keys()} == leaves.keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(file.get_tensor(path), leaf)


@pytest.mark.slow
def test_user_module_loads_a_file_of_flax_code(tmp_path):
    params, stats = MODELS["attention"].init(KEY)
    save_file(flatten_dict(params, sep="."), tmp_path / "own.safetensors")
    assert_identical(load(tmp_path / "own.safetensors", MODELS["attention"]), (params, stats))


@pytest.mark.parametrize("name", ["nested", "nnx"])
@pytest.mark.parametrize("start", ["fresh", "zeros", "xavier"])
def test_user_module_with_a_new_head(name, start, tmp_path):
    model = MODELS[name]
    params, stats = jax.tree.map(lambda x: x + 1, model.init(KEY))
    save(tmp_path / "own.safetensors", model, params, stats)
    loaded, _ = load(tmp_path / "own.safetensors", model, head=start, key=KEY)
    expected, head = model.init(KEY)[0], loaded
    for part in model.head.split("."):
        expected, head = expected[part], head[part]
    assert head.keys() == {"kernel", "bias"}
    if start == "xavier":
        bound = np.sqrt(6 / sum(expected["kernel"].shape))
        assert bound / 2 < jnp.abs(head["kernel"]).max() <= bound
    else:
        expected = expected if start == "fresh" else jax.tree.map(jnp.zeros_like, expected)
        assert_identical(head, expected)
    differs = jax.tree.map(lambda a, b: (a != b).any(), loaded, params)
    assert sum(map(bool, jax.tree.leaves(differs))) == 2


def test_user_module_with_a_head_without_a_last_layer(tmp_path):
    model = Linen(Nested(), shape=SHAPE, head="block")
    save(tmp_path / "own.safetensors", model, *model.init(KEY))
    with pytest.raises(WeightsError, match=r"'block' is the last(?s:.*)name that layer"):
        load(tmp_path / "own.safetensors", model, head="zeros")


def test_user_module_refuses_another_file(tmp_path):
    model = MODELS["nested"]
    save(tmp_path / "own.safetensors", model, *model.init(KEY))
    other = Linen(Compact(), shape=SHAPE, head="head")
    with pytest.raises(WeightsError, match=r"not in the network(?s:.*)block.bn.mean"):
        load(tmp_path / "own.safetensors", other)
