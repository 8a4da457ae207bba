"""`stacked=` of `Linen` and `NNX`: layers of nn.scan and nnx.vmap as nested dicts."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxft
from jaxft.errors import ModelError
from jaxft.models import NNX, Linen

sys.path.insert(0, str(Path(__file__).parent))
from block_modules import SCANNED, SHAPE, LinenLayer, LinenScanned, NNXScanned, images

KEY = jax.random.key(3)
UNSPLIT = {
    "linen": Linen(LinenScanned(), shape=SHAPE, head="head"),
    "nnx": NNX(NNXScanned, shape=SHAPE, head="head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_stacked_layers_are_those_of_the_module(name):
    model, unsplit = SCANNED[name], UNSPLIT[name]
    (params, stats), (arrays, _) = model.init(KEY), unsplit.init(KEY)
    assert {*params["layers"]} == {"0", "1", "2", "3"}
    for i in range(4):
        jax.tree.map(
            lambda layer, all_layers, i=i: np.testing.assert_array_equal(layer, all_layers[i]),
            params["layers"][str(i)],
            arrays["layers"],
        )
    expected, _ = unsplit.apply(arrays, stats, images(), norms="running")
    actual, _ = model.apply(params, stats, images(), norms="running")
    np.testing.assert_array_equal(actual, expected)


def test_trees_of_an_nnx_module_have_its_stacked_layers():
    model = SCANNED["nnx"]
    trees = model.trees(model.build(rngs=nnx.Rngs(KEY)))
    jax.tree.map(np.testing.assert_array_equal, trees, model.init(KEY))


def test_patterns_select_stacked_layers():
    params, _ = SCANNED["linen"].init(KEY)
    stage = jaxft.Stage("s", {"layers[2:].attn": 1.0, "layers.1": 1.0, "head": 1.0}, 1)
    (plan,) = jaxft.plan([stage], params)
    labels = zip(jaxft.paths(params), jax.tree.leaves(plan.labels), strict=True)
    trained = {path.rpartition(".")[0] for path, name in labels if name != jaxft.FROZEN}
    attention = {f"attn.{part}" for part in ("key", "query", "value", "out")}
    layer = {"LayerNorm_0", "GroupNorm_0", "mlp"} | attention
    assert trained == {"head"} | {f"layers.1.{x}" for x in layer} | {
        f"layers.{i}.{x}" for i in (2, 3) for x in attention
    }


class NormInStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=2, **axes)(name="layers")(x.mean((1, 2)), None)
        return nn.Dense(5, name="head")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=True)(x), None


class TwoStacks(nn.Module):
    """Two stacks of different depths below one module."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(Both(name="both")(x).mean(1))


class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x).reshape(len(x), -1, 8)
        for depth in (2, 3):
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(LinenLayer, length=depth, **axes)(name=f"by{depth}")(x, None)
        return x


WRONG = {
    "unknown": (LinenScanned(), "layer", r"stacked, pattern 'layer' matches no parameter.*\n.*Did"),
    "string": (LinenScanned(), None, r"stacked is 'layers'; it must be a tuple of paths"),
    "leaves of different lengths": (TwoStacks(), "both", r"'both' has no common number of layers "),
    "statistics": (NormInStack(), "layers", "has the batch norm layer layers.BatchNorm_0 in a"),
}


@pytest.mark.parametrize(("module", "path", "message"), WRONG.values(), ids=WRONG)
def test_wrong_stacks_are_refused(module, path, message):
    stacked = "layers" if path is None else (path,)
    with pytest.raises(ModelError, match=message):
        Linen(module, shape=SHAPE, head="head", stacked=stacked)


@pytest.mark.slow
def test_two_stacks_of_different_depths():
    model = Linen(TwoStacks(), shape=SHAPE, head="head", stacked=("both.by2", "both.by3"))
    params, stats = model.init(KEY)
    assert {k: [*v] for k, v in params["both"].items() if k[:2] == "by"} == {
        "by2": ["0", "1"],
        "by3": ["0", "1", "2"],
    }
    assert model.apply(params, stats, images(), norms="running")[0].shape == (4, 5)
