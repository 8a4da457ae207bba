"""Initialisation of a new head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.weights import load, save
from jaxft.weights.head import new_head

MODEL = create("cifar_resnet8", num_classes=100)
CONCAT = create("cifar_resnet8", num_classes=100, concat_pool=True)
KEY = jax.random.key(5)


@pytest.mark.parametrize("model", [MODEL, CONCAT], ids=["one layer", "two layers"])
def test_new_head_fresh_is_the_network_initialisation(model):
    jax.tree.map(
        np.testing.assert_array_equal, new_head(model, "fresh", KEY), model.init(KEY)[0]["fc"]
    )


@pytest.mark.slow
def test_new_head_zeros_gives_zero_logits():
    params, stats = MODEL.init(KEY)
    params["fc"] = new_head(MODEL, "zeros", KEY)
    logits, _ = MODEL.apply(params, stats, jnp.ones((2, 8, 8, 3)), norms="running")
    np.testing.assert_array_equal(logits, 0)


def test_new_head_zeros_leaves_the_first_of_two_layers():
    head, fresh = new_head(CONCAT, "zeros", KEY), new_head(CONCAT, "fresh", KEY)
    np.testing.assert_array_equal(head["6"]["kernel"], 0)
    np.testing.assert_array_equal(head["2"]["kernel"], fresh["2"]["kernel"])


def test_new_head_xavier_has_the_bound_of_torch():
    head, fresh = new_head(MODEL, "xavier", KEY), new_head(MODEL, "fresh", KEY)
    bound = (6 / (64 + 100)) ** 0.5  # torch.nn.init.xavier_uniform_
    assert float(jnp.abs(head["kernel"]).max()) == pytest.approx(bound, rel=0.01)
    assert float(head["kernel"].std()) == pytest.approx(bound / 3**0.5, rel=0.03)
    np.testing.assert_array_equal(head["bias"], fresh["bias"])  # unchanged, as in torch


def test_new_head_from_a_tree(tmp_path):
    save(tmp_path / "w", MODEL, *MODEL.init(jax.random.key(0)))
    given = {"kernel": np.full((64, 100), 2.0), "bias": np.arange(100.0)}
    params, _ = load(tmp_path / "w", MODEL, head=given)
    jax.tree.map(np.testing.assert_array_equal, params["fc"], given)
    assert params["fc"]["bias"].dtype == jnp.float32


MISFITS = {
    "shape": {"kernel": np.ones((64, 7)), "bias": np.ones(100)},
    "missing": {"kernel": np.ones((64, 100))},
    "no array": {"kernel": "x", "bias": np.ones(100)},
    "other keys": {"kernel": {0: np.ones((64, 100))}, "bias": np.ones(100)},
}


@pytest.mark.parametrize("given", MISFITS.values(), ids=MISFITS)
def test_new_head_from_a_tree_must_fit(given):
    with pytest.raises(WeightsError, match=r"wants .*bias.*\(100,\).*kernel.*\(64, 100\)"):
        new_head(MODEL, given, KEY)


@pytest.mark.parametrize("start", ["fresh", "zeros", "xavier", "tree"])
def test_new_head_has_running_statistics(start, tmp_path):
    other = create("cifar_resnet8", num_classes=5, concat_pool=True)
    save(tmp_path / "w.safetensors", other, *other.init(jax.random.key(1)))
    fresh, fresh_stats = CONCAT.init(KEY)
    head = fresh["fc"] if start == "tree" else start
    _, stats = load(tmp_path / "w.safetensors", CONCAT, head=head, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, stats["fc"], fresh_stats["fc"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stats))
