"""Forks: runs that start from the end of another run's stage."""

import dataclasses
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from mortal import QUIET, RECIPE, killed, rows, saving_stage_ends_only, train, train_to_end

from jaxft import (
    L2SP,
    CheckpointError,
    Recipe,
    RecipeError,
    Stage,
    WeightsError,
    data,
    finetune,
    models,
)
from jaxft.checkpoint import checksums, weights_only
from jaxft.cli.finetune import run as run_command
from jaxft.recipe_file import save
from jaxft.weights import load

pytestmark = pytest.mark.usefixtures("shared_programs")

HEAD, LATE, ALL = RECIPE.stages


def fork(recipe, workdir, run, stage=None):
    with saving_stage_ends_only():
        return finetune(recipe, workdir, fork_from=run, stage=stage, console=QUIET)


def with_last(recipe, **fields):
    *before, last = recipe.stages
    return dataclasses.replace(recipe, stages=(*before, dataclasses.replace(last, **fields)))


@pytest.fixture(scope="module")
def run(whole):
    return whole, train_to_end(whole)  # finished: returns its result


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["head", "late"])  # the next stage carries state, or not
def test_fork_with_same_recipe_ends_as_the_run(stage, run, tmp_path):
    workdir, result = run
    forked = fork(RECIPE, tmp_path / "fork", workdir, stage)
    assert forked.weights.read_bytes() == result.weights.read_bytes()
    after = [row for row in rows(workdir) if row["stage"] not in ("head", stage)]
    assert rows(tmp_path / "fork") == after


@pytest.mark.slow
def test_fork_with_other_last_stage_leaves_the_run_unchanged(run, tmp_path):
    workdir, result = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    other = with_last(RECIPE, train={"layer3": 1e-3, "fc": 1e-2}, epochs=1)
    assert fork(other, tmp_path / "fork", workdir, "late").score != result.score
    assert [(row["stage"], row["step"]) for row in rows(tmp_path / "fork")] == [("all", 22)]
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.slow
def test_killed_fork_resumes(run, tmp_path):
    """Also if it was killed before its first checkpoint."""
    workdir, result = run
    for point, at in (("save", 18), ("step", 22)):
        with killed(point, at):
            fork(RECIPE, tmp_path / "fork", workdir, "late")
    forked = fork(RECIPE, tmp_path / "fork", workdir, "late")
    assert forked.weights.read_bytes() == result.weights.read_bytes()


@pytest.mark.slow
def test_fork_by_command(run, tmp_path, capsys):
    workdir, result = run
    save(RECIPE, tmp_path / "recipe.yaml")
    command = [tmp_path / "recipe.yaml", "--workdir", tmp_path / "fork", "--processes", "1"]
    with saving_stage_ends_only():
        code = run_command([*map(str, command), "--fork-from", str(workdir), "--stage", "late"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"from stage 'late' of {workdir}" in printed.out.replace("\n", " ")
    assert (tmp_path / "fork/model.safetensors").read_bytes() == result.weights.read_bytes()


@pytest.mark.slow
def test_fork_anchors_to_start_of_the_first_run(tmp_path):
    """The first run stores its start if any of its stages has an anchor."""
    stages = (
        dataclasses.replace(HEAD, epochs=1),
        dataclasses.replace(LATE, steps=4),
        dataclasses.replace(ALL, epochs=1, anchor=L2SP()),
    )
    recipe = dataclasses.replace(RECIPE, stages=stages)
    result = train_to_end(tmp_path / "run", recipe)
    forked = fork(recipe, tmp_path / "fork", tmp_path / "run", "late")
    assert forked.weights.read_bytes() == result.weights.read_bytes()


ROWS = np.random.default_rng(0).integers(0, 100, (48, 8, 8, 3), np.uint8)
COLOURS = np.arange(48) % 2
ROWS[np.arange(48), ..., COLOURS] += 120  # class 0 is red, class 1 is green
JOB = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="colours",
    train_split="train[:32]",
    val_split="train[32:]",
    image_size=8,
    resize_size=8,
    batch_size=8,
    augment="none",
    stages=(Stage("head", {"fc": 1e-2}, epochs=4),),
)
MORE = (*JOB.stages, Stage("more", {"fc": 1e-6}, epochs=1))


def colours(turned=False):
    return data.arrays(ROWS, 1 - COLOURS if turned else COLOURS, classes=["a", "b"])


def measured(recipe, weights, turned):
    """Returns the validation accuracy of exported weights."""
    model = models.create("cifar_resnet8", num_classes=2)
    params, stats = load(weights, model)
    x = recipe.preprocessing.normalize(ROWS[32:])
    views = [x, x[:, :, ::-1]] if recipe.tta == "flip" else [x]
    logits = sum(model.apply(params, stats, view, norms="running")[0] for view in views)
    return np.mean(np.argmax(logits, -1) == (COLOURS[32:] ^ turned))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("job")
    with saving_stage_ends_only():
        return workdir, finetune(JOB, workdir, data=colours(), console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("turned", "change"),
    [(True, {}), (False, {"mean": (0.9, 0.1, 0.5)}), (False, {"tta": "flip"})],
    ids=["other_images", "other_mean", "tta"],
)
def test_fork_score_is_measured_on_its_own_images_and_settings(turned, change, job, tmp_path):
    """The stage never improves on its start, whose score the fork must measure itself."""
    workdir, before = job
    recipe = dataclasses.replace(JOB, stages=MORE, **change)
    forked = finetune(
        recipe, tmp_path / "fork", data=colours(turned), fork_from=workdir, console=QUIET
    )
    described = json.loads((tmp_path / "fork/model.json").read_text())["score"]
    assert described == forked.score.values
    recipe = recipe.expecting(recipe.preprocessing)
    assert forked.score.accuracy == measured(recipe, forked.weights, turned)
    assert forked.score != before.score


OTHER_NETWORK = dataclasses.replace(RECIPE, model="cifar_resnet20", weights=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage", "error", "message"),
    [
        (RECIPE, "lat", CheckpointError, "'lat'; stages that have ended: head, late, all"),
        (RECIPE, "all", RecipeError, "no stage after 'all'"),
        (RECIPE, None, RecipeError, "no stage after 'all'"),
        (
            dataclasses.replace(RECIPE, stages=(HEAD, ALL)),
            "late",
            RecipeError,
            "no stage of that name; it has head, all",
        ),
        (OTHER_NETWORK, "late", CheckpointError, "18 does not fit this run:\n.*layer1"),
    ],
    ids=["unknown", "last", "none", "not_in_recipe", "other_network"],
)
def test_fork_errors(recipe, stage, error, message, run, tmp_path):
    with pytest.raises(error, match=message):
        fork(recipe, tmp_path / "fork", run[0], stage)
    assert not (tmp_path / "fork").exists()


@pytest.mark.slow
def test_fork_needs_ended_stage(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run with a checkpoint to fork from"):
        fork(RECIPE, tmp_path / "fork", tmp_path / "nowhere")
    with killed("step", 4):  # after the checkpoint of step 3
        train(tmp_path / "run")
    with pytest.raises(CheckpointError, match="to fork from: no stage has ended"):
        fork(RECIPE, tmp_path / "fork", tmp_path / "run")
    assert not (tmp_path / "fork").exists()


def test_stage_needs_fork_from(tmp_path):
    with pytest.raises(RecipeError, match="stage"):
        finetune(RECIPE, tmp_path / "run", stage="late", console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fork_of_arrays_that_are_not_finite_is_refused(tmp_path):
    """Earlier versions did not check running statistics."""
    recipe = dataclasses.replace(RECIPE, stages=(HEAD, LATE))
    train_to_end(tmp_path / "run", dataclasses.replace(RECIPE, stages=(HEAD,)))
    place = tmp_path / "run/checkpoints/8"
    _, stats = weights_only.read_weights(place)
    stats["bn1"]["mean"][0] = np.nan
    with ocp.StandardCheckpointer() as writer:
        writer.save(place / "stats", stats, force=True)
    checksums.seal(place)
    with pytest.raises(
        WeightsError, match=r"end of stage 'head' .* 1\.bn1\.mean \(1 of 16 values\)"
    ):
        fork(recipe, tmp_path / "fork", tmp_path / "run", "head")
