"""Stages of each strategy by name."""

from types import SimpleNamespace

import jax
import pytest

from jaxft import L1SP, Adam, LinearProbe, RecipeError, Stage, models, plan
from jaxft.default_stages import default_stages, names
from jaxft.optim.schedules import CosineAnnealingLR

NETWORK = SimpleNamespace(
    blocks=("stem", "layer1", "layer2", "head"),
    block_patterns=(("conv1", "bn1"), ("layer1",), ("layer2",), ("fc",)),
)
FIELDS = {"optimizer": Adam(), "schedule": CosineAnnealingLR(), "norms": "eval"}
HEAD = {"fc": 1e-3}


def stage(name, train, epochs, **fields):
    return Stage(name, HEAD | train, epochs, **FIELDS | fields)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("probe", (Stage("probe", {"fc": LinearProbe()}),)),
        ("full", (stage("all", {"*": 1e-4}, 5),)),
        ("l1-sp", (stage("all", {"*": 1e-4}, 5, anchor=L1SP(body=1e-3)),)),
        ("surgical-stem", (stage("all", {"conv1": 1e-4, "bn1": 1e-4}, 5),)),
        ("norms", (stage("all", {"**.scale": 1e-3, "**.bias": 1e-3}, 5),)),
        (
            "gradual",
            (
                stage("to-layer2", {"layer2": 1e-4}, 1, carry="keep"),
                stage("to-layer1", dict.fromkeys(("layer2", "layer1"), 1e-4), 2, carry="keep"),
                stage(
                    "to-stem", dict.fromkeys(("layer2", "layer1", "conv1", "bn1"), 1e-4), 2,
                    carry="keep",
                ),
            ),
        ),
    ],
)  # fmt: skip
def test_default_stages(name, stages):
    assert default_stages(name, NETWORK, lr=1e-4, epochs=5) == stages


def test_gradual_first_begins_at_the_input():
    first, last = default_stages("gradual-first", NETWORK, lr=1e-4, epochs=2)
    assert (list(first.train), first.epochs) == (["fc", "conv1", "bn1"], 1)
    assert list(last.train) == ["fc", "conv1", "bn1", "layer1", "layer2"]


def test_layer_decay_of_the_body():
    (only,) = default_stages("layer-decay", NETWORK, lr=1.0, epochs=2)
    assert only.train == {"fc": 10, "layer2": 1, "layer1": 0.75, "conv1": 0.5625, "bn1": 0.5625}


@pytest.mark.parametrize("model", ["cifar_resnet8", "resnet18"])
def test_every_strategy_plans_a_network(model):
    network = models.create(model, num_classes=3)
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    for name in names(network):
        stages = default_stages(name, network, lr=1e-4, epochs=3)
        assert sum(each.epochs for each in stages if not each.linear_probe) in (0, 3)
        for each in stages:
            plan(each, params)


def test_unknown_strategy():
    with pytest.raises(RecipeError, match=r"no strategy is called 'lpft'. Did you mean 'lp-ft'\?"):
        default_stages("lpft", NETWORK, lr=1e-4, epochs=2)
