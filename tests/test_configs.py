"""Every file of configs/: its docstring says how to run it, and a shrunken copy of it runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from narrow import narrowed, shallow

from jaxft import data, finetune, paths, plan
from jaxft.checkpoint.weights_only import read_weights
from jaxft.labels import FROZEN, leaf_labels
from jaxft.open_recipe import draw_start, open_network
from jaxft.recipe_file import read, resolve, save
from jaxft.report.console import Console
from jaxft.stage_options import NormChoice

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SIDE, BATCH = 33, 4  # pixels, images


def shrunk(recipe):
    """The recipe over a handful of small images, each stage one epoch of two steps."""

    def short(stage):
        length = {"epochs": stage.epochs and 1, "steps": stage.steps and 2}
        return replace(stage, train=shallow(stage.train), **length, batch_size=None)

    return replace(
        recipe,
        weights=None,
        head="fresh" if recipe.head == "keep" else recipe.head,
        shots=None,
        train_split=None,
        val_split=None,
        batch_size=BATCH,
        image_size=SIDE,
        resize_size=SIDE,
        workers=0,
        stages=tuple(map(short, recipe.stages)),
    )


def images(recipe):
    """As many classes as the recipe can have, and two batches of them to train on."""
    classes = "01" if recipe.binary else "012"
    rng = np.random.default_rng(0)
    targets = np.arange(2 * BATCH) % len(classes)
    pixels = rng.integers(0, 256, (2 * BATCH, SIDE, SIDE, 3), np.uint8)
    source = data.arrays(pixels, targets, classes)
    return data.Splits(source, source, ())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(path):
    said = path.read_text().split('"""')[1]
    assert f"\n    python scripts/finetune.py configs/{path.name} --workdir runs/" in said
    assert "\nSource: " in said
    assert "easured" in said  # what, or that nothing has been
    assert any(f"mode `{choice}`" in said.replace("\n", " ") for choice in get_args(NormChoice))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_saved_one_is_equal(path, tmp_path):
    recipe = read(path)
    save(recipe, tmp_path / "recipe.yaml")
    assert read(tmp_path / "recipe.yaml") == resolve(recipe) == recipe


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_and_what_is_frozen_stays(path, tmp_path):
    recipe = shrunk(read(path))
    splits = images(recipe)
    with narrowed(recipe.stages):
        model = open_network(recipe, None, splits.train.classes)
        before, _ = draw_start(recipe, model, None)
        result = finetune(recipe, tmp_path, data=splits, console=Console(quiet=True))
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [stage.name for stage in recipe.stages]
    assert all(np.isfinite([row["train_loss"], row["val_loss"]]).all() for row in rows)
    assert np.isfinite(result.score.loss)
    for row, stage in zip(rows, plan(recipe.stages, before), strict=True):
        after, _ = read_weights(tmp_path / "checkpoints" / str(row["step"]))
        if stage.stage.merge_lora:
            before = jax.device_get(model.merge_and_reset(before))
        leaves = zip(*map(jax.tree.leaves, (before, after)), strict=True)
        moved = [not np.array_equal(*pair) for pair in leaves]
        trains = [label != FROZEN for label in leaf_labels(before, stage.labels)]
        named = zip(paths(before), moved, trains, strict=True)
        assert [path for path, moved, trains in named if moved and not trains] == []
        assert any(moved) or stage.stage.restore == "best"
        before = after


@pytest.mark.parametrize("name", ["vit_mae", "convnext_finetune"])
def test_every_parameter_of_the_full_network_trains(name):
    recipe = read(CONFIGS[0].with_name(f"{name}.py"))
    params, _ = jax.eval_shape(open_network(recipe, None, ("a", "b")).init, jax.random.key(0))
    (stage,) = plan(recipe.stages, params)
    assert FROZEN not in leaf_labels(params, stage.labels)
