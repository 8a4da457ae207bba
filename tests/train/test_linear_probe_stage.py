"""Whole runs with a linear probe."""

import dataclasses

import jax
import numpy as np
import pytest
from faults import before, failing
from flax import linen
from mortal import (
    QUIET,
    RECIPE,
    KilledError,
    assert_same_end,
    killed,
    rows,
    steps,
    terminated,
    train,
    train_to_end,
)

from jaxft import (
    InterruptedRunError,
    LinearProbe,
    ModelError,
    RecipeError,
    Stage,
    data,
    finetune,
    logistic_regression,
    models,
    weights,
)
from jaxft.report.console import Console
from jaxft.train import linear_probe_stage
from jaxft.train.eval_step import eval_step
from jaxft.train.metrics import Metrics, Score

pytestmark = pytest.mark.usefixtures("shared_programs")

C = (1e-2, 1e4, 1.0)
PROBE = Stage("probe", {"fc": LinearProbe(C)})
LATE = Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=2, carry="keep", restore="last")
# The first stage's optimizer state of layer3 is kept over the second, for the third.
SOLVED = dataclasses.replace(
    RECIPE,
    stages=(
        Stage("first", {"fc": 1e-3, "layer3": 1e-3}, steps=2, restore="last"),
        dataclasses.replace(PROBE, carry="keep"),
        LATE,
    ),
)
ALONE = dataclasses.replace(RECIPE, stages=(PROBE,))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder, result, and arrays of each checkpoint."""
    workdir, saved = tmp_path_factory.mktemp("unbroken"), {}

    def fetch(_, step, __, arrays, **___):
        saved[step] = jax.device_get(arrays)

    with before("save", fetch):
        result = train_to_end(workdir, SOLVED)
    return workdir, result, saved


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, train_to_end(workdir, ALONE)


def pictures(source, preprocessing):
    """Returns all images in one batch."""
    (batch,) = data.eval_batches(source, preprocessing, batch_size=len(source), workers=0)
    return batch


@pytest.mark.slow
def test_linear_probe_sets_head_to_best_logistic_regression(alone):
    """Of features with running statistics, each image once, without augmentation."""
    workdir, result = alone
    model, pre = ALONE.network(5), ALONE.expecting(data.Preprocessing()).preprocessing
    train, val = data.open_source(
        ALONE.data, train=ALONE.train_split, val=ALONE.val_split, shots=ALONE.shots
    )
    before = weights.load("asset:digits_0to4", model, head="fresh", key=jax.random.key(0))
    params, stats = weights.load(workdir, model)
    batch = pictures(train, pre)
    features, _ = model.apply(*before, pre.normalize(batch.image), norms="running", last="layer3")
    scores = []
    for fit in logistic_regression(features, batch.target, 5, c=C):
        head = {"kernel": np.float32(fit.kernel), "bias": np.float32(fit.bias)}
        scores.append(
            Metrics.total(
                [eval_step(model, pre)({**before[0], "fc": head}, stats, pictures(val, pre))]
            ).score
        )
    best = max(range(3), key=lambda i: (scores[i].accuracy, -scores[i].loss))
    assert best == 2  # neither the strongest nor the weakest penalty
    (fit,) = logistic_regression(features, batch.target, 5, c=(C[best],))
    np.testing.assert_allclose(params["fc"]["kernel"], fit.kernel, rtol=0, atol=1e-4)
    np.testing.assert_allclose(params["fc"]["bias"], fit.bias, rtol=0, atol=1e-4)
    assert result.score.loss == pytest.approx(scores[best].loss, rel=1e-4)

    (row,) = rows(workdir)
    assert (row["stage"], row["epoch"], row["step"], steps(workdir)) == ("probe", 1, 1, [1])
    assert (row["val_loss"], row["lr"]) == (result.score.loss, {})
    logits = np.asarray(features) @ fit.kernel + fit.bias
    own = logits[np.arange(len(logits)), batch.target]
    expected = np.mean(np.logaddexp.reduce(logits, axis=1) - own)
    assert row["train_loss"] == pytest.approx(expected, rel=1e-3)
    after = {**params, "fc": before[0]["fc"]}
    for a, b in zip(jax.tree.leaves((after, stats)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_linear_probe_prefers_stronger_of_equal_penalties():
    fit = logistic_regression([[0.0], [1.0]], [0, 1], 2)[0]
    at = [
        linear_probe_stage._merit(fit._replace(c=c), Score(1.0, 0.5, 1.0)) for c in (0.1, 1.0, 0.01)
    ]
    assert max(at) == at[2]


@pytest.mark.slow
def test_linear_probe_prints_table_of_penalties(tmp_path, capsys):
    recipe = dataclasses.replace(ALONE, batch_size=32)
    finetune(recipe, tmp_path / "run", console=Console())
    said = capsys.readouterr().out
    lines = said.splitlines()
    (chosen,) = [line for line in lines if "chosen" in line]
    assert chosen.split()[0] == "C=1e+0"
    assert [line.split()[0] for line in lines if line.strip().startswith("C=")] == [
        "C=1e-2", "C=1e+4", "C=1e+0",
    ]  # fmt: skip
    assert "Stage 1 of 1: probe, a logistic regression on the features before" in said
    assert "Stage 'probe' ended: it is solved. Epoch 1 was its best by accuracy and is kept" in said
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_linear_probe_keeps_optimizer_state_except_of_head(unbroken):
    workdir, _, saved = unbroken
    assert [(row["stage"], row["step"]) for row in rows(workdir)] == [
        ("first", 2), ("probe", 3), ("late", 5),
    ]  # fmt: skip
    states = saved[5]["opt_state"].inner_states
    counts = {group: states[group].inner_state.rule.count for group in ("fc", "layer3")}
    assert counts == {"fc": 2, "layer3": 4}  # Adam's


@pytest.mark.slow
def test_linear_probe_killed_is_solved_again(unbroken, tmp_path):
    """While features are computed, in validation, and before its checkpoint."""
    workdir = tmp_path / "killed"
    for point, at in (("pass", "train"), ("evaluate", 1), ("save", 3)):
        with killed(point, at):
            train(workdir, SOLVED)
        assert steps(workdir) == [2]
    train_to_end(workdir, SOLVED)
    assert_same_end(workdir, unbroken[0])


@pytest.mark.slow
def test_linear_probe_stopped_in_validation_is_not_solved_again(unbroken, tmp_path):
    workdir = tmp_path / "stopped"
    stopped = pytest.raises(InterruptedRunError, match="came in stage 'probe', and step 3 is saved")
    with terminated("evaluate", 3), stopped:
        train(workdir, SOLVED)
    with failing("pass", KilledError, at="train"):
        train_to_end(workdir, SOLVED)
    assert_same_end(workdir, unbroken[0])


@pytest.mark.slow
def test_linear_probe_stopped_at_start_saves_nothing(alone, tmp_path):
    stopped = pytest.raises(InterruptedRunError, match="nothing has been trained yet")
    # The questions before follow the batches of 100 images to validate, of 8.
    with terminated("stop asked", 14), stopped:
        train_to_end(tmp_path / "run", dataclasses.replace(ALONE, sync_steps=1))
    train_to_end(tmp_path / "run", ALONE)
    assert_same_end(tmp_path / "run", alone[0])


@pytest.mark.slow
def test_fork_from_linear_probe(unbroken, tmp_path):
    workdir, result, _ = unbroken
    forked = finetune(SOLVED, tmp_path / "run", fork_from=workdir, stage="probe", console=QUIET)
    assert forked.weights.read_bytes() == result.weights.read_bytes()


class Own(linen.Module):
    @linen.compact
    def __call__(self, images):
        return linen.Dense(5, name="head")(images.mean((1, 2)))


OWN = models.Linen(Own(), shape=(8, 8, 3), head="head")
ERRORS = {
    "another layer": ({"layer3": LinearProbe()}, {}, r"nothing else, but .* selects layer3\.0"),
    "more than the head": ({"*": LinearProbe()}, {}, r"nothing else, but .* and \d+ more\. Write"),
    "half of it": (
        {"fc.kernel": LinearProbe()}, {},
        r"selects fc\.kernel\. Write train=\{'fc': LinearProbe\(\)\}",
    ),
    "two layers": (
        {"fc": LinearProbe()}, {"concat_pool": True}, r"needs a head that is one linear layer: .*"
        r"features \[b 128\] and the head fc\.0\.bias \[128\], .* learning rate instead",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("train", "fields", "message"), ERRORS.values(), ids=ERRORS)
def test_linear_probe_needs_linear_head(train, fields, message, tmp_path):
    recipe = dataclasses.replace(ALONE, stages=(LATE, Stage("p", train)), **fields)
    with pytest.raises(RecipeError, match=f"stage 'p': .*{message}"):
        train_to_end(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_linear_probe_needs_network_of_several_blocks(tmp_path):
    stages = (Stage("p", {"head": LinearProbe()}),)
    recipe = dataclasses.replace(ALONE, stages=stages, weights=None, dropout=0.0)
    with pytest.raises(ModelError, match=r"stage 'p': a LinearProbe .* Own is a single block"):
        finetune(recipe, tmp_path / "run", model=OWN, console=QUIET)
    assert not (tmp_path / "run").exists()
