"""Runs of user modules with blocks: cached features, linear probe, remat, strategies."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET, assert_close, saving_stage_ends_only
from test_finetune import RECIPE

import jaxft
from jaxft import (
    SGD,
    Classifier,
    LinearProbe,
    ModelError,
    RecipeError,
    Stage,
    data,
    finetune,
    logistic_regression,
    recipe_file,
    weights,
)
from jaxft.checkpoint.contents import Snapshot
from jaxft.cli import probe_layers
from jaxft.comparison import compare
from jaxft.data import Batch, Splits
from jaxft.default_stages import LR, default_stages
from jaxft.devices import Devices
from jaxft.models import Linen
from jaxft.recipe_file import read
from jaxft.train.compiled_stage import compile_stage, flops
from jaxft.train.stage_program import build_programs

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from block_modules import CNN, SCANNED, SHAPE, VIT, ResCNN

MODELS = {"linen": CNN, "nnx": VIT}
LATE = {"linen": ("ResBlock_2", "head"), "nnx": ("layers.2", "norm", "head")}
OWN = dataclasses.replace(
    RECIPE, model="own", weights=None, dropout=0.0, augment="none", optimizer=SGD(momentum=0.9)
)


def late_stage(name, **fields):
    return Stage("late", dict.fromkeys(LATE[name], 1e-2), 3, restore="last", **fields)


def train(workdir, model, recipe, **fields):
    with saving_stage_ends_only():
        return finetune(recipe, workdir, model=model, console=QUIET, **fields)


def program(model, **fields):
    recipe = dataclasses.replace(OWN, **fields).expecting(data.Preprocessing())
    images = data.arrays(np.zeros((32, *SHAPE), np.uint8), np.arange(32) % 5, "56789")
    trees = jax.eval_shape(model.init, jax.random.key(0))
    return build_programs(recipe, model, Splits(images, images), Devices(), trees)[0], trees


def flat(trees):
    """Maps paths to arrays."""
    leaves = jax.tree.leaves(trees)
    return dict(zip(jaxft.paths(trees), map(np.asarray, leaves), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_cached_features_change_no_late_stage(name, tmp_path):
    """Also with a last batch that is not full, of training and of validation images."""
    recipe = dataclasses.replace(OWN, stages=(late_stage(name),), shots=7)
    for cache_mib in (0, recipe.cache_mib):
        run = dataclasses.replace(recipe, cache_mib=cache_mib)
        train(tmp_path / str(cache_mib), MODELS[name], run)
    assert_close(tmp_path / str(recipe.cache_mib), tmp_path / "0")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_late_stage_with_cached_features_saves_the_flops_of_frozen_blocks(name):
    model = MODELS[name]

    def compiled(**fields):
        stage, trees = program(model, stages=(late_stage(name),), **fields)
        opt_state = jax.eval_shape(stage.transform().init, trees[0])
        return compile_stage(stage, Snapshot(*trees, opt_state)), trees

    (apart, trees), (together, _) = compiled(), compiled(cache_mib=0)
    x, forward = jax.ShapeDtypeStruct((OWN.batch_size, *SHAPE), jnp.float32), {}
    for block in model.blocks:
        run = jax.jit(partial(model.apply, norms="running", first=block, last=block))
        forward[block] = flops(run.lower(*trees, x).compile())
        x = jax.eval_shape(run, *trees, x)[0]
    late = sum(forward[block] for block in LATE[name])
    frozen = sum(forward.values()) - late
    assert 0.9 * frozen < apart.prefix_flops < 1.1 * frozen
    assert 0.9 * frozen < together.flops - apart.flops < 1.1 * frozen
    assert apart.flops < 4 * late  # forward, backward and optimizer of the late blocks


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        (CNN, True, ""),
        (Linen(ResCNN(), shape=SHAPE, head="head"), True, ""),
        (dataclasses.replace(CNN, module=ResCNN(dropout=0.0)), True, ""),
    ],
    ids=["dropout of the head", "default blocks", "no dropout"],
)
def test_features_before_a_dropout_are_cached(model, train, reason):
    stage, _ = program(model, stages=(Stage("head", {"head": 0.1}, 3),))
    assert (stage.prefix.train, stage.prefix.reason) == (train, reason)
    assert stage.prefix.first == "head"


def test_features_after_a_dropout_are_not_cached():
    class Drops(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4, name="first")(x.mean((1, 2)))
            x = nn.Dense(4, name="second")(nn.Dropout(0.5, deterministic=not train)(x))
            return nn.Dense(5, name="head")(nn.relu(x))

    model = Linen(Drops(), shape=SHAPE, head="head", blocks=("second",))
    stage, _ = program(model, stages=(Stage("head", {"head": 0.1}, 3),))
    assert (stage.prefix.train, stage.prefix.val) == (False, True)
    assert stage.prefix.reason.startswith("stem draws random numbers in training, as by dropout.")
    better = dataclasses.replace(model, blocks=("Dropout_0",))
    stage, _ = program(better, stages=(Stage("late", {"second": 0.1, "head": 0.1}, 3),))
    assert stage.prefix.train
    assert stage.prefix.blocks == ("stem",)


class Centres(nn.Module):
    """Subtracts the mean of the batch, or scales activations in training."""

    in_training: bool

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4, name="body")(x.mean((1, 2)))
        x = (x * 1.5 if train else x) if self.in_training else x - x.mean(0)
        return nn.Dense(5, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize("in_training", [False, True])
def test_features_that_are_not_the_images_own_are_not_cached(in_training, tmp_path):
    model = Linen(Centres(in_training), shape=SHAPE, head="head")
    recipe = dataclasses.replace(OWN, stages=(Stage("h", {"head": 0.1}, 2, restore="last"),))
    with pytest.raises(ModelError, match=r"stage 'h': features of Centres cannot be cached.* stem"):
        train(tmp_path / "cached", model, recipe)
    train(tmp_path / "run", model, dataclasses.replace(recipe, cache_mib=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_linear_probe_of_user_model(name, tmp_path):
    model, strength = MODELS[name], 0.1
    start = model.init(jax.random.key(5))
    recipe = dataclasses.replace(OWN, stages=(Stage("p", {"head": LinearProbe((strength,))}),))
    result = train(tmp_path, model, recipe, start=start)
    params, _ = weights.load(result.weights, model)
    after = flat(params)
    changed = {path for path, x in flat(start[0]).items() if not np.array_equal(x, after[path])}
    assert changed == {"head.kernel", "head.bias"}
    classifier = Classifier.load(result.weights, model=model)
    source = data.open_source(recipe.data, shots=recipe.shots, seed=recipe.seed).train
    images = np.stack([source[i][0] for i in range(len(source))])
    features = classifier.features(images)
    (fit,) = logistic_regression(features, source.targets, 5, c=(strength,))
    np.testing.assert_allclose(params["head"]["kernel"], fit.kernel, atol=1e-4)


def test_linear_probe_needs_linear_head_of_user_model(tmp_path):
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="last")(nn.relu(nn.Dense(4, name="first")(x)))

    class TwoLayers(nn.Module):
        @nn.compact
        def __call__(self, x):
            return MLP(name="head")(nn.Dense(4)(x.mean((1, 2))))

    class ConvHead(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(5, (1, 1), name="head")(nn.Conv(4, (3, 3))(x)).mean((1, 2))

    stages = (Stage("p", {"head": LinearProbe()}),)
    for module, message in (
        (TwoLayers(), r"features \[b 4\] and the head head\.first\.bias"),
        (ConvHead(), r"features \[b 8 8 4\] and the head head.bias \[5\], head.kernel \[1 1 4 5\]"),
    ):
        model = Linen(module, shape=SHAPE, head="head")
        with pytest.raises(RecipeError, match=message):
            train(tmp_path / "run", model, dataclasses.replace(OWN, stages=stages))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_remat_of_user_model_changes_no_step(name):
    model = MODELS[name]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, *SHAPE), np.uint8)
    batch = Batch(pixels, np.arange(8, dtype=np.int32) % 5, np.full(8, True))
    start = model.init(jax.random.key(0))

    def stepped(remat):
        stage, _ = program(model, stages=(Stage("all", {"*": 0.1}, 1),), remat=remat)
        state, frozen = stage.state(Snapshot(*start, stage.transform().init(start[0])))
        step = jax.jit(stage.train_step(keep_gradients=True))
        return step(state, frozen, batch, np.int32(3))

    def near(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max(initial=1e-6))

    jax.tree.map(near, stepped(False), stepped(True))


@pytest.mark.parametrize("strategy", ["gradual", "layer-decay", "lp-ft", "surgical-ResBlock_0"])
def test_default_stages_of_user_model_follow_its_blocks(strategy):
    stages = default_stages(strategy, CNN, lr=1e-3, epochs=4)
    patterns = [set(stage.train) for stage in stages]
    middle = {"ResBlock_0", "ResBlock_1"}
    assert (
        patterns
        == {
            "gradual": [
                {"head", "ResBlock_2"},
                {"head", "ResBlock_2"} | middle,
                {"head", "ResBlock_2", "Conv_0"} | middle,
            ],
            "layer-decay": [{"head", "ResBlock_2", "Conv_0"} | middle],
            "lp-ft": [{"head"}, {"*"}],
            "surgical-ResBlock_0": [{"head"} | middle],
        }[strategy]
    )
    jaxft.plan(stages, CNN.init(jax.random.key(0))[0])


FACTORY = """
import flax.linen as nn
from jaxft import models

class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))

def build(classes):
    return models.Linen(CNN(classes), shape=(8, 8, 3), head="head", blocks=("Conv_1", "Conv_2"))

def whole(classes):
    return models.Linen(CNN(classes), shape=(8, 8, 3), head="head", call=lambda m, x, _: 2 * m(x)
                        + m(x))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "blocks", "verdict"),
    [
        ("build", ["stem", "Conv_1", "Conv_2", "head"], "Of the blocks before the head, "),
        ("whole", ["network"], "The network is a single block: models.Linen"),
    ],
)
def test_probe_layers_prints_the_blocks_of_user_model(
    function, blocks, verdict, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / f"own_{function}.py").write_text(FACTORY)
    recipe = dataclasses.replace(OWN, model=f"own_{function}:{function}")
    recipe_file.save(recipe, tmp_path / "recipe.yaml")
    assert probe_layers.run([str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line.split()]
    assert [name for name in names if name in blocks] == blocks
    assert verdict in " ".join(printed.split())


@pytest.mark.slow
def test_compare_of_user_model(tmp_path):
    strategies = ("probe", "surgical-ResBlock_2")
    how = {"seeds": 1, "epochs": 1, "model": CNN, "console": QUIET}
    ranks = compare(OWN, tmp_path, strategies=strategies, **how)
    assert {rank.strategy for rank in ranks} == {*strategies}
    assert read(tmp_path / "best.yaml").stages == default_stages(
        ranks[0].strategy, CNN, lr=LR, epochs=1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_stacked_layers_train_at_their_own_rates(name, tmp_path):
    """Against one rate for all layers: a step of SGD is proportional to the rate."""
    model = SCANNED[name]
    start = model.init(jax.random.key(5))
    rates = {"head": 1e-2, "layers.3": 1e-2, "layers.2": 5e-3, "layers[1:2]": 1e-3}
    changes = {}
    for run, rate in (("own", rates), ("same", dict.fromkeys(rates, 1e-2))):
        recipe = dataclasses.replace(OWN, stages=(Stage("s", rate, steps=1, restore="last"),))
        result = train(tmp_path / run, model, recipe, start=start)
        after = flat(weights.load(result.weights, model)[0])
        changes[run] = {path: after[path] - x for path, x in flat(start[0]).items()}
    frozen = ("layers.0", "embed", "patches", "norm")
    for path, change in changes["own"].items():
        if path.startswith(frozen):
            assert not change.any(), path
        else:
            rate = next(r for p, r in rates.items() if path.startswith(p.replace("[1:2]", ".1")))
            np.testing.assert_allclose(change, changes["same"][path] * rate / 1e-2, atol=3e-7)
    assert any(changes["own"][path].any() for path in changes["own"] if "layers.1" in path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_frozen_stacked_layers_have_no_optimizer_state(name):
    stage, (params, _) = program(
        SCANNED[name], stages=(Stage("s", {"layers.2": 1e-2, "head": 1e-2}, 1),)
    )
    trained = [x.size for path, x in zip(jaxft.paths(params), jax.tree.leaves(params), strict=True)
               if path.startswith(("layers.2.", "head."))]  # fmt: skip
    state = jax.eval_shape(stage.transform().init, params)
    sizes = [x.size for x in jax.tree.leaves(state) if x.size > 1]
    assert sum(sizes) == sum(size for size in trained if size > 1)
