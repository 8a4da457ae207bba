"""The range test against fastai's `lr_find`; the scripts of the range test and the block probe."""

import csv
import dataclasses
import math
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxft import SGD, EarlyStop, Recipe, RecipeError, Stage, Update, plan
from jaxft.lr_finder import Curve, named, ramp, range_test, trial, valley
from jaxft.optim import schedules
from jaxft.recipe_file import save
from jaxft.train.auto_rgn import block_norms

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/lr_finder.npz"
STEPS = {"diverges": 100, "ends": 100, "nan": 100, "few": 30}
RECIPE = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=6,
    optimizer=SGD(momentum=0.9),
    batch_size=8,
    augment="none",
    image_size=8,
    resize_size=8,
    workers=0,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=1),
        Stage("all", {"fc": 1e-2, "*": 1e-3}, epochs=1, until=EarlyStop()),
    ),
)


@pytest.mark.parametrize("case", STEPS)
def test_range_test_suggestions_are_fastais(case, golden):
    lrs, losses, smoothed, expected = (
        golden[f"{case}/{name}"] for name in ("lr", "losses", "smoothed", "suggestions")
    )
    end = next((i + 1 for i, loss in enumerate(losses) if math.isnan(loss)), len(losses))
    curve = Curve(STEPS[case], lrs[:end], losses[:end])  # ours ends with the first NaN
    np.testing.assert_allclose(curve.smoothed, smoothed[:end], rtol=3e-6)  # theirs is float32
    assert list(curve.suggestions()) == ["valley", "steepest", "minimum / 10"]
    assert list(curve.suggestions().values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3, 3, 4, 5, 6, 7], 0),  # never falls
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 3),  # -1 + 3 + 1
        ([5, 9, 8, 7, 6, 5, 4, 9, 9], 3),  # six long, up to the 4
        ([9, 1, 8, 2, 7, 3, 6, 4, 9], 3),  # 9 8 7 6 4 is not in a row, yet counts as five that are
    ],
)
def test_valley(losses, expected):
    assert valley(np.arange(len(losses)), np.array(losses)) == expected


def test_ramp_scales_all_rates_and_drops_schedules_and_endings():
    cosine = schedules.CosineAnnealingLR()
    train = {"a": Update(3e-3, schedule=cosine, optimizer=SGD(momentum=0.5)), "b": 1e-3}
    fields = {"max_minutes": 1, "ema": 0.9, "clip_norm": 1.0, "norms": "batch"}
    stage = Stage("x", train, 4, cosine, until=EarlyStop(), **fields)
    (ramped,) = plan(
        [ramp(stage, low=1e-4, high=1.0, steps=10)], {"a": jnp.ones(1), "b": jnp.ones(2)}
    )
    assert ramped.stage.train["a"].optimizer == SGD(momentum=0.5)
    assert (ramped.stage.norms, ramped.stage.clip_norm) == ("batch", 1.0)
    assert (ramped.stage.until, ramped.stage.max_minutes, ramped.stage.ema) == (None, None, None)
    assert ramped.stage.length(steps_per_epoch=2) == 10
    params = {"a": jnp.zeros(()), "b": jnp.ones(2)}
    tx = ramped.transform(steps_per_epoch=2)
    state = tx.init(params)
    for step in range(10):
        rates = ramped.lr_at(state, steps_per_epoch=2)
        expected = 1e-4 * 1e4 ** (step / 10)
        assert rates == pytest.approx({"a": expected, "b": expected / 3}, rel=1e-5)
        _, state = tx.update(params, state, params)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "learning rates rise from 1 to 1; say 0 < low < high"),
        ({"low": 0.0}, "from 0 to 10"),
        ({"high": math.inf}, "to inf"),
        ({"steps": 9}, "9 steps shows nothing; take 10 or more"),
    ],
)
def test_ramp_bounds_are_checked(bounds, message):
    with pytest.raises(RecipeError, match=message):
        ramp(RECIPE.stages[0], **{"low": 1e-7, "high": 10.0, "steps": 100, **bounds})


def test_curve_that_diverges_at_once_is_refused():
    with pytest.raises(RecipeError, match=r"diverged in 3 of 100 steps, at lr 1\.0e\+01"):
        Curve(100, [1e-1, 1.0, 10.0], [1.0, 3.0, math.nan]).suggestions()


@pytest.mark.slow
def test_range_test_ends_when_loss_diverges():
    stage = dataclasses.replace(RECIPE.stages[0], auto_rgn=True)
    tried = trial(RECIPE, ramp(stage, low=1e-2, high=1e6, steps=30))
    # Not on the host: a view of an array would keep it from being donated.
    before = jax.tree.map(jnp.copy, (tried.params, tried.stats))
    curve = range_test(tried, low=1e-2, high=1e6)
    assert 10 < len(curve.losses) == len(curve.lrs) < 30
    assert curve.smoothed[-1] > 4 * curve.smoothed.min() >= curve.smoothed[-2]
    assert curve.lrs[1] / curve.lrs[0] == pytest.approx(1e8 ** (1 / 30))
    jax.tree.map(np.testing.assert_array_equal, (tried.params, tried.stats), before)
    assert range_test(tried, low=1e-2, high=1e6) == curve


def run_script(name, capsys, *arguments):
    assert import_module(f"jaxft.cli.{name}").run([*map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if str(arguments[-1]) not in line)
    return printed


@pytest.mark.slow
def test_find_rate(tmp_path, capsys):
    save(RECIPE, tmp_path / "recipe.yaml")
    out = tmp_path / "out"
    options = ("--stage", "all", "--steps", 20, "--low", 1e-4, "--batch-size", 6, "--out", out)
    printed = run_script("find_lr", capsys, tmp_path / "recipe.yaml", *options)
    with (out / "curve.csv").open() as file:
        rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[1]["lr"] == pytest.approx(1e-4 * 1e5 ** (1 / 20))
    curve = Curve(20, [row["lr"] for row in rows], [row["loss"] for row in rows])
    assert [row["smoothed"] for row in rows] == pytest.approx(list(curve.smoothed))
    cells = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    found = curve.suggestions().values()
    assert cells[1] == ["fc", "1.0e-02", *(f"{rate:.1e}" for rate in found)]
    assert cells[2] == ["*", "1.0e-03", *(f"{rate / 10:.1e}" for rate in found)]
    with Image.open(out / "lr.png") as picture:
        assert picture.size == (960, 600)
        assert len(picture.getcolors(10**6)) > 10


@pytest.mark.slow
def test_probe_layers(tmp_path, capsys):
    """Compares the ratios with the gradient of a plain loss, on the only batch."""
    recipe = dataclasses.replace(RECIPE, batch_size=30)
    save(recipe, tmp_path / "recipe.yaml")
    printed = run_script("probe_layers", capsys, tmp_path / "recipe.yaml")
    tried = trial(recipe, Stage("probe", {"*": 1.0}, steps=5, norms="eval"))
    model = tried.program.model
    images, targets = map(np.stack, zip(*(tried.source[i] for i in range(30)), strict=True))

    def loss(params):
        shown = tried.program.recipe.preprocessing.normalize(images)
        logits, _ = model.apply(params, tried.stats, shown, norms="running")
        return -jax.nn.log_softmax(logits)[jnp.arange(30), targets].mean()

    def norm(tree, patterns):
        found = [x for name in patterns for x in jax.tree.leaves(tree[name])]
        return math.sqrt(sum(float(jnp.sum(x**2)) for x in found))

    gradients = jax.grad(loss)(tried.params)
    blocks = dict(zip(model.blocks, model.block_patterns, strict=True))
    expected = {b: norm(gradients, p) / norm(tried.params, p) for b, p in blocks.items()}
    assert block_norms(tried.program, tried.params, tried.stats, tried.batches(5)) == pytest.approx(
        expected, rel=1e-4
    )
    rows = [line.split() for line in printed.splitlines() if line.startswith("  ")][1:]
    assert [row[0] for row in rows] == list(blocks)
    assert [row[2] for row in rows] == [f"{ratio:.3g}" for ratio in expected.values()]
    assert max(len(row[3]) for row in rows) == 32
    largest = max(list(blocks)[:-1], key=expected.__getitem__)
    assert f"before the head, {largest} has the largest" in printed
    assert "But the head is freshly drawn" in " ".join(printed.split())


def test_stage_by_name():
    assert named(RECIPE, None).name == "head"
    assert named(RECIPE, "all").name == "all"
    with pytest.raises(RecipeError, match="no stage is called 'al'; there are 'head', 'all'"):
        named(RECIPE, "al")
