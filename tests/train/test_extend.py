"""`extend`: an extended run ends as a run of that length from the start."""

import dataclasses
import re

import numpy as np
import pytest
from flax import linen as nn
from mortal import (
    QUIET,
    assert_close,
    assert_same_end,
    killed,
    rows,
    saving_stage_ends_only,
    steps,
)

from jaxft import Adam, EarlyStop, Recipe, RecipeError, Stage, data, finetune, models
from jaxft.optim import schedules
from jaxft.report.console import Console

pytestmark = pytest.mark.usefixtures("shared_programs")

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
IMAGES = data.arrays(PIXELS, np.arange(24) % 2, classes=["a", "b"])
STEP = schedules.StepLR(2, gamma=0.5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("early", "late"):
            x = nn.relu(nn.Dense(8, name=name)(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
HEAD = Stage("head", {"head": 1e-2}, epochs=1)
LATE = Stage("late", {"head": 1e-2, "late": 1e-3}, epochs=2, schedule=STEP, carry="keep")
RECIPE = Recipe(
    model="net",
    data="noise",
    optimizer=Adam(),
    train_split="train[:16]",
    val_split="train[16:]",
    image_size=8,
    resize_size=8,
    batch_size=8,
    augment="flip",
    stages=(HEAD, LATE),
)


def recipe(*stages):
    return dataclasses.replace(RECIPE, stages=stages)


def last(**fields):
    return recipe(HEAD, dataclasses.replace(LATE, **fields))


def run(of, workdir, console=QUIET, **options):
    return finetune(of, workdir, data=IMAGES, model=NETWORK, console=console, **options)


LONGER = {
    "epochs": (RECIPE, last(epochs=4)),
    "steps": (last(epochs=None, steps=3), last(epochs=None, steps=7)),
    "average": (last(ema=0.9), last(ema=0.9, epochs=3)),
    "last_handed_on": (last(epochs=1, restore="last"), last(epochs=3, restore="last")),
    "patience": (
        last(epochs=5, until=EarlyStop(min_delta=1.0, patience=1)),
        last(epochs=5, until=EarlyStop(min_delta=1.0, patience=3)),
    ),
    "appended_stage": (
        RECIPE,
        recipe(HEAD, LATE, Stage("all", {"head": 1e-3, "*": 1e-4}, epochs=1)),
    ),
    "appended_stage_that_keeps": (
        RECIPE,
        recipe(HEAD, LATE, Stage("again", {"head": 1e-3, "late": 1e-3}, epochs=1, carry="keep")),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONGER)
def test_extended_run_ends_as_longer_run(case, tmp_path):
    """Bit-identical, with schedules that do not depend on the length of the stage."""
    before, longer = LONGER[case]
    run(before, tmp_path / "extended")
    run(longer, tmp_path / "extended", extend=True)
    run(longer, tmp_path / "longer")
    assert_same_end(tmp_path / "extended", tmp_path / "longer")


@pytest.mark.slow
def test_extended_run_starts_from_end_without_earlier_checkpoint(tmp_path, capsys):
    """A stage of one epoch has no checkpoint but its end."""
    run(recipe(HEAD), tmp_path / "run")
    two = recipe(dataclasses.replace(HEAD, epochs=2))
    run(two, tmp_path / "run", console=Console(), extend=True)
    assert "continues from the arrays at its end" in " ".join(capsys.readouterr().out.split())
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_extended_run_skips_a_damaged_checkpoint_before_the_end(tmp_path, capsys):
    before, longer = (last(epochs=epochs) for epochs in (3, 4))
    run(before, tmp_path / "extended")
    checkpoints = tmp_path / "extended" / "checkpoints"
    assert steps(tmp_path / "extended")[-3:] == [4, 6, 8]
    largest = max((checkpoints / "6").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    run(longer, tmp_path / "extended", console=Console(), extend=True)
    output = " ".join(capsys.readouterr().out.split())
    assert "has become longer, and continues from step 4, the last one saved before." in output
    assert "/6 is damaged: " in output
    run(longer, tmp_path / "longer")
    assert_same_end(tmp_path / "extended", tmp_path / "longer")


@pytest.mark.slow
def test_extend_twice_without_earlier_checkpoint(tmp_path):
    """The second time, the former end of the stage lies before its end."""
    for epochs in (1, 2, 3):
        with saving_stage_ends_only():
            run(recipe(dataclasses.replace(HEAD, epochs=epochs)), tmp_path, extend=epochs > 1)
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_extend_does_not_undo_early_stop(tmp_path):
    stopped = EarlyStop(min_delta=1.0, patience=1)
    run(last(epochs=5, until=stopped), tmp_path / "run")
    before = rows(tmp_path / "run")
    run(last(epochs=6, until=stopped), tmp_path / "run", extend=True)
    assert rows(tmp_path / "run") == before


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ended")
    run(last(schedule=schedules.CosineAnnealingLR()), workdir)
    return workdir


COSINE = {"schedule": schedules.CosineAnnealingLR()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "extend", "message"),
    [
        (last(**COSINE, epochs=4), False, r"stages\[late\]\.epochs: 2 -> 4\nGo on .* --extend"),
        (
            last(**COSINE, epochs=4),
            True,
            r"'late': the learning rates .* CosineAnnealingLR depend on its length",
        ),
        (
            recipe(
                HEAD,
                dataclasses.replace(LATE, **COSINE),
                Stage("all", {"*": 1e-3}, epochs=2, schedule_time="continue"),
            ),
            True,
            r"CosineAnnealingLR depend on its length, of which 2 epochs are planned and 4 wanted",
        ),
        (last(**COSINE, epochs=1), True, r"stages\[late\]\.epochs: 2 -> 1\n--extend takes"),
        (last(**COSINE, train={"head": 1e-1}), True, r"train\[head\]: 0\.01 -> 0\.1\n .*late\]: 0"),
        (recipe(HEAD), True, r"stages\[late\]: a stage -> absent\n"),
        (last(**COSINE, optimizer=Adam(b1=0.8)), False, r"\.optimizer: None -> Adam\(b1=0\.8\)\n"),
    ],
    ids=["without", "cosine", "spanning", "shorter", "rates", "fewer_stages", "optimizer"],
)
def test_extend_refuses_other_fields(now, extend, message, ended):
    saved = (ended / "recipe.yaml").read_bytes()
    with pytest.raises(RecipeError, match=message) as refused:
        run(now, ended, extend=extend)
    assert len(str(refused.value)) < 600
    assert (ended / "recipe.yaml").read_bytes() == saved


@pytest.mark.slow
def test_extend_keeps_groups_of_a_begun_stage(tmp_path):
    with killed("step", 5):
        run(RECIPE, tmp_path / "run")
    more = (HEAD, LATE, Stage("all", {"late.kernel": 1e-3, "*": 1e-4}, epochs=1))
    with pytest.raises(RecipeError, match=re.escape("'late' has begun, and the stages that")):
        run(recipe(*more), tmp_path / "run", extend=True)
    run(RECIPE, tmp_path / "run")
    run(recipe(*more), tmp_path / "run", extend=True)
    run(recipe(*more), tmp_path / "longer")
    # Other groups make other programs, which round differently.
    assert_close(tmp_path / "run", tmp_path / "longer")


@pytest.mark.slow
def test_extended_run_without_checkpoint_keeps_its_recipe_file(tmp_path):
    """The command of the shorter run neither shortens nor overwrites it."""
    run(recipe(HEAD), tmp_path)
    two = recipe(dataclasses.replace(HEAD, epochs=2))
    with killed("step"):
        run(two, tmp_path, extend=True)
    longer = (tmp_path / "recipe.yaml").read_bytes()
    for extend in (False, True):
        with pytest.raises(RecipeError, match=r"is to go on for longer: .* delete the file"):
            run(recipe(HEAD), tmp_path, extend=extend)
    with pytest.raises(RecipeError, match=r"epochs: 1 -> 2\nGo on with it for longer by --extend"):
        run(two, tmp_path)
    assert (tmp_path / "recipe.yaml").read_bytes() == longer
    (tmp_path / "recipe.yaml").write_text("stages: [")  # damaged: the checkpoint's counts
    run(two, tmp_path, extend=True)
    assert (tmp_path / "recipe.yaml").read_bytes() == longer
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2]
