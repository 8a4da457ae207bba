"""Whole runs of user models on the digits."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import freeze
from mortal import QUIET, killed, rows, saving_stage_ends_only
from test_finetune import RECIPE

import jaxft
from jaxft import RecipeError, Stage, WeightsError, finetune, weights
from jaxft.models import NNX, Linen

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from user_modules import Compact, TrainingArgument

LINEN = Linen(Compact(dropout=0.1), shape=(8, 8, 3), head="head")
STAGES = (
    Stage("head", {"head": 1e-2}, epochs=1),
    Stage("late", {"head": 1e-3, "*_1": 1e-3, "Dense_0": 1e-3}, epochs=2, restore="last"),
    Stage("all", {"*": 1e-3}, epochs=1, restore="last"),
)
OWN = dataclasses.replace(RECIPE, model="cnn", weights=None, dropout=0.0, stages=STAGES)


def pretrained():
    params, stats = LINEN.init(jax.random.key(5))
    return freeze(params), freeze(jax.tree.map(lambda x: x + 0.5, stats))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    with saving_stage_ends_only():
        return workdir, finetune(OWN, workdir, model=LINEN, start=pretrained(), console=QUIET)


def flat(trees):
    """Maps paths to bytes."""
    leaves = jax.tree.leaves(trees)
    return {p: np.asarray(x).tobytes() for p, x in zip(jaxft.paths(trees), leaves, strict=True)}


@pytest.mark.slow
def test_stages_of_user_model_train_only_their_patterns(unbroken, tmp_path):
    workdir, result = unbroken
    assert [row["stage"] for row in rows(workdir)] == ["head", "late", "late", "all"]
    start = flat(pretrained())
    after = flat(weights.load(result.weights, LINEN))
    assert not [path for path in start if after[path] == start[path]]

    recipe = dataclasses.replace(OWN, stages=STAGES[:2])
    two = finetune(recipe, tmp_path / "run", model=LINEN, start=pretrained(), console=QUIET)
    after = flat(weights.load(two.weights, LINEN))
    frozen = {path for path in start if after[path] == start[path]}
    assert {path.split(".", 1)[1] for path in frozen} == {
        "Conv_0.kernel", "Conv_0.bias", "BatchNorm_0.scale", "BatchNorm_0.bias",
        "BatchNorm_0.mean", "BatchNorm_0.var",
    }  # fmt: skip


@pytest.mark.slow
def test_killed_run_of_user_model_ends_as_unbroken(unbroken, tmp_path):
    whole, result = unbroken
    for step in (5, 9):
        with killed("step", step):
            finetune(OWN, tmp_path / "run", model=LINEN, start=pretrained(), console=QUIET)
    again = finetune(OWN, tmp_path / "run", model=LINEN, console=QUIET)
    assert again.weights.read_bytes() == result.weights.read_bytes()
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_run_of_user_model_starts_another(unbroken, tmp_path):
    recipe = dataclasses.replace(OWN, weights=str(unbroken[0]), head="keep", stages=STAGES[:1])
    result = finetune(recipe, tmp_path / "run", model=LINEN, console=QUIET)
    before, after = (flat(weights.load(r.weights, LINEN)) for r in (unbroken[1], result))
    assert {path for path in before if after[path] != before[path]} <= {
        "0.head.kernel", "0.head.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_run_of_nnx_module(tmp_path):
    model = NNX(TrainingArgument, shape=(8, 8, 3), head="fc")
    recipe = dataclasses.replace(OWN, stages=(Stage("s", {"fc": 1e-2}, 1, restore="last"),))
    start = model.init(jax.random.key(OWN.seed))
    result = finetune(recipe, tmp_path / "run", model=model, console=QUIET)
    before, after = flat(start), flat(weights.load(result.weights, model))
    assert {path for path in before if after[path] != before[path]} == {"0.fc.kernel", "0.fc.bias"}


def test_user_model_that_does_not_fit_is_refused(tmp_path):
    ten = dataclasses.replace(OWN, data="digits")
    with pytest.raises(RecipeError, match="Compact has 5 classes, and the images have 10"):
        finetune(ten, tmp_path / "run", model=LINEN, console=QUIET)
    params, stats = pretrained()
    wrong = (params, {"BatchNorm_0": stats["BatchNorm_0"]})
    with pytest.raises(WeightsError, match=r"1.BatchNorm_1.mean: missing"):
        finetune(OWN, tmp_path / "run", model=LINEN, start=wrong, console=QUIET)
    assert not (tmp_path / "run").exists()
