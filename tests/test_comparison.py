"""Comparison of strategies: ranks, resume, shared features."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from scipy import stats

from jaxft import DataError, Recipe, RecipeError, Stage, compare, data, models, weights
from jaxft.comparison import Outcome, ranked
from jaxft.recipe_file import read
from jaxft.report.comparison_table import comparison_table, draw_comparison
from jaxft.train.feature_cache import StageFeatures

RECIPE = Recipe(
    model="cifar_resnet8", data="given", image_size=8, resize_size=8, batch_size=6, augment="none",
    stages=(Stage("all", {"*": 1e-3}, 1),),
)  # fmt: skip


def outcome(strategy, seed, accuracy, loss=1.0):
    return Outcome(strategy, seed, accuracy, loss, 2.0, 10)


def images(count, seed=0):
    targets = np.arange(count, dtype=np.int32) % 3
    pixels = np.random.default_rng(seed).integers(0, 100, (count, 8, 8, 3), np.uint8)
    pixels += 70 * targets[:, None, None, None].astype(np.uint8)
    return data.arrays(pixels, targets, ("ants", "bees", "crabs"))


def test_ranks_by_mean_accuracy_and_then_loss():
    ranks = ranked(
        [
            *(outcome("full", seed, 0.5 + 0.1 * seed) for seed in (0, 1)),
            *(outcome("probe", seed, 0.55, loss=0.5) for seed in (1, 0)),
            *(outcome("diverged", seed, math.nan) for seed in (0, 1)),
            *(outcome("best", seed, 0.8 - 0.1 * seed) for seed in (0, 1)),
        ]
    )
    assert [rank.strategy for rank in ranks] == ["best", "probe", "full", "diverged"]
    best, _, full, _ = ranks
    assert (best.difference, best.interval) == (0, None)
    assert [each.seed for each in ranks[1].outcomes] == [0, 1]
    paired = stats.ttest_rel([0.5, 0.6], [0.8, 0.7]).confidence_interval(0.95)
    assert full.difference == pytest.approx(-0.2)
    np.testing.assert_allclose(full.interval, (paired.low, paired.high))


def test_single_seed_has_no_interval():
    ranks = ranked([outcome("full", 0, 0.5), outcome("probe", 0, 0.6)])
    assert [(rank.strategy, rank.interval) for rank in ranks] == [("probe", None), ("full", None)]


def test_comparison_table_and_picture(tmp_path):
    names = ("lp-ft", "surgical-layer4", "norms")
    ranks = ranked([outcome(name, seed, 0.1 * seed) for name in names for seed in range(3)])
    lines = list(comparison_table(ranks))
    assert (len(lines), max(map(len, lines)) <= 80) == (4, True)
    draw_comparison(tmp_path / "picture.png", ranks, "title")
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_compare_runs_resumes_and_shares_features(tmp_path, monkeypatch, capsys):
    passes, compute = [], StageFeatures._compute
    monkeypatch.setattr(
        StageFeatures, "_compute", lambda *key: passes.append(key[1:]) or compute(*key)
    )
    model = models.create(RECIPE.model, num_classes=5)
    weights.save(tmp_path / "start.safetensors", model, *model.init(jax.random.key(0)))
    recipe = dataclasses.replace(RECIPE, weights=str(tmp_path / "start.safetensors"))
    tmp_path /= "comparison"
    splits = data.Splits(images(12), images(9, seed=1))
    options = {"data": splits, "lr": 1e-3, "epochs": 1}
    first = compare(recipe, tmp_path, strategies=["probe"], seeds=2, **options)
    assert sorted(split for split, _ in passes) == ["train", "val"]  # for both seeds
    kept = sorted(path.name for path in (tmp_path / "probe-1").iterdir())
    assert "metrics.jsonl" in kept
    assert not {"checkpoints", "model.safetensors"} & set(kept)

    capsys.readouterr()
    ranks = compare(recipe, tmp_path, strategies=["probe", "norms"], seeds=2, **options)
    assert "probe" not in capsys.readouterr().out  # has run
    assert {rank.strategy: rank.outcomes for rank in ranks}["probe"] == first[0].outcomes
    (norms,) = (rank.outcomes[0] for rank in ranks if rank.strategy == "norms")
    assert first[0].outcomes[0].trained < norms.trained < 5_000

    best = read(tmp_path / "best.yaml")
    assert best.stages[0].name == ("probe" if ranks[0].strategy == "probe" else "all")
    with pytest.raises(RecipeError, match=r"comparison with other settings: epochs \(1, now 2\)"):
        compare(recipe, tmp_path, strategies=["probe"], **options | {"epochs": 2})
    other = dataclasses.replace(recipe, batch_size=4)
    with pytest.raises(RecipeError, match=r"batch_size \(6, now 4\)"):
        compare(other, tmp_path, strategies=["probe"], **options)
    options["data"] = data.Splits(images(12, seed=2), splits.val)
    with pytest.raises(DataError, match=r"on other images \('then'\):\n  train: as many images"):
        compare(recipe, tmp_path, strategies=["probe"], **options)
    assert len(json.loads((tmp_path / "comparison.json").read_text())["outcomes"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": ["lp_ft"]}, "no strategy is called 'lp_ft'. Did you mean 'lp-ft'"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"lr": -1.0}, "rate of .* is -1.0"),
    ],
)
def test_compare_reports_mistakes_before_any_run(arguments, message, tmp_path):
    splits = data.Splits(images(6), images(6))
    with pytest.raises(RecipeError, match=message):
        compare(RECIPE, tmp_path, data=splits, **arguments)
    assert not list(tmp_path.iterdir())
